"""Computes the log-probabilities of completions with a model: forms packs (the rows of one forward pass), and computes
attention and the head."""
