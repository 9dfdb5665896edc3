"""The traced PyTorch modules: one for each kind of component, parameters named as in the checkpoint."""
