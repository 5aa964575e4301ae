"""Floor 1: tasks, streams and their images."""
