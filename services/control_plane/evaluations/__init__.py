"""Evaluates policies in the background: which of two models answers better, how good a model's answers are, whether a
policy prefers what people preferred, and how far it has moved from its reference model.
"""
