"""Floor 4: the loop over tasks, evaluation, and runs that survive."""
