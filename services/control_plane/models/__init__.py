"""Finds, lists, shares, deletes, serves and downloads models: base models from the settings, and trained models of
jobs."""
