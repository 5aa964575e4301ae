"""Floor 1: CLIP and its kin over transformers, LoRA over peft."""
