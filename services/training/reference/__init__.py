"""Computes the reference model's log-probabilities, by its deployment or by the trainer, and compares the two."""
