"""Floor 2: the training loop."""
