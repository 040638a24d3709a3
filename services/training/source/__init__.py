"""Fetches the training file that a user's URI names, and unpacks it to uncompressed JSON Lines."""
