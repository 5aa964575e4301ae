"""Floor 2: synthetic image-text pairs: what to draw (``prompts``), drawing it (``generator``), keeping it (``store``)."""
