"""Modules that all parts of the control plane use: the database, errors, logs and metrics."""
