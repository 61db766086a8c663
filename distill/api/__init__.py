"""Functions for models and tokenizers in memory: each does what the stage of its name does, without a recipe."""
