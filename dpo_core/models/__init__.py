"""Loads models from disk, puts adapters on models, and checks and saves models."""
