"""Loads models from disk, puts adapters (LoRA) on models, and checks and saves models."""
