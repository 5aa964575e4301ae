"""Floor 1: CLIP over transformers, LoRA over peft."""
