"""Demo checkpoints: small, random, and laid out as the official Kimi K2.5 release is.

`k25_export.demo.checkpoint.write_demo_checkpoint` writes one; `k25_export.demo.presets` holds the sizes.
"""
