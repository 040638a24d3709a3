"""Turns groups of texts into the token ids that a model reads. A group is a prompt with its completions."""
