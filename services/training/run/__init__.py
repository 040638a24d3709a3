"""Runs the training workers of a job, and handles commands to stop, deaths of workers, and full storage."""
