"""Stores people's votes on completions as rows of training data, and makes training files of these rows."""
