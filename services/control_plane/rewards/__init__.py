"""Computes the rewards of completions, either with a policy and its reference model, or with a reward model."""
