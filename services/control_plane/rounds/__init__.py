"""Improves a policy in rounds: its own answers are scored, become training data, and train the next policy."""
