"""Small onnx-ir passes, one concern a file: each says what it needs and what it guarantees, and checks both."""
