"""What a model is worth and what it costs: quality, size, speed and memory, and answers side by side."""
