"""The reference's log-probs: who computes them, and whether they agree with the trainer's."""
