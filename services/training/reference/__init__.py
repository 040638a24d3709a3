"""Computes the reference's log-probs, by its deployment or by the trainer, and checks that the two agree."""
