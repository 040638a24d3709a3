"""Finds, shares, deploys and queries base models and trained models."""
