"""Runs the training workers of an attempt, and handles commands, deaths of workers, and full storage."""
