"""Code that depends on transformers: loading models, layouts of architectures, LoRA, model sizes."""
