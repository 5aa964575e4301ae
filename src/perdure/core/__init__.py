"""Floor 0: what everything stands on: errors, names, options, weights, files."""
