"""The parts of `scripts/train_demo.py`: the trainable model, its data, its optimiser, and the tensors it leaves."""
