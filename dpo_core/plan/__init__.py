"""Computes whether a training run fits into the memory of its devices. Needs only the shapes of a model's weights, and
imports no torch."""
