"""Evaluates policies in the background: which of two answers better, how good answers are, and how far a policy has
moved from its reference."""
