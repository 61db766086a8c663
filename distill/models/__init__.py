"""Everything that knows transformers: loading, the layouts of architectures, LoRA, sizes."""
