"""Evaluates policies in the background: which of two models answers better, how good a model's answers are, whether a
policy prefers the completions that people preferred, and how far a policy has moved from its reference model.
"""
