"""Computes the log-probabilities of completions with a model. Forms packs (groups of completions that one forward pass
computes together), and computes attention and logits for each pack."""
