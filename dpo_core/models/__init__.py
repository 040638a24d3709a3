"""Loads models from disk, puts adapters on them, checks and saves them."""
