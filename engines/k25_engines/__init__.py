"""Stage 2: the components of a bundle become TensorRT engines. Not built yet; `docs/architecture.md` has its place."""
