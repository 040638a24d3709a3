"""A job's events, metrics and logs, for clients that follow it."""
