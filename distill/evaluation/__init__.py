"""Measures models: quality, size, speed and memory, accuracy on tasks, and answers to the same prompts."""
