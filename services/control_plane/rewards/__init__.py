"""Computes the rewards of completions: from a policy and its reference model, or from a reward model."""
