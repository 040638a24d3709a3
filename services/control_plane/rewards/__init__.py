"""Answers how much a policy prefers completions over what its reference does, and what a reward model gives them."""
