"""Runs the training workers of a job. Also handles commands to pause or stop, deaths of workers, and full storage."""
