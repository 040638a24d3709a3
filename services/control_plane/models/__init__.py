"""Finds, lists, shares, deploys and downloads base models and trained models."""
