"""Computes the log-probabilities of completions with a model: packs, attention, head."""
