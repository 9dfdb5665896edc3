"""Stage 1: a Kimi K2.5 checkpoint becomes a bundle of ONNX components and a manifest."""
