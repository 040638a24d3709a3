"""Turns a group of texts into the token ids that a model reads."""
