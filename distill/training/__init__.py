"""Training: the Lightning module, the order in which a student is wrapped, the trainer and its callbacks."""
