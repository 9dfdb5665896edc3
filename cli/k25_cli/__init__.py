"""The `k25-export` command: parses, calls one function of a stage, prints."""
