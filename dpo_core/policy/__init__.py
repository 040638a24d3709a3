"""Computes the log-probabilities of completions with a model: forms packs (groups that one forward pass computes
together), and computes attention and logits for them."""
