"""What is kept of a run: rows of size, speed and quality, their tables and verdicts, and Weights & Biases."""
