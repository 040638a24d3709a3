"""Answers requests for rewards of completions: of a policy, compared with its reference model, or of a reward model."""
