"""Holds what all parts of the control plane use: the database, errors, logs, metrics, and limits on concurrent work."""
