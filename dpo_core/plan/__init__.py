"""Computes whether a training run fits into memory. Needs only the shapes of a model's weights, and imports no
torch."""
