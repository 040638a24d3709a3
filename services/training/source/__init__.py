"""Fetches the training file that a user's URI names, and unpacks it to plain JSON Lines."""
