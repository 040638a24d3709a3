"""Computes the log-probabilities of completions with a model.

A pack holds the groups (prompts with their completions) that go through one forward pass together. The modules here
form packs, and compute attention and logits for each pack.
"""
