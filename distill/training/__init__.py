"""Training: the Lightning module, the one order in which a student is wrapped, the trainer and its callbacks."""
