"""Trains models in Ray jobs: a driver process prepares the data in Ray tasks and starts Ray Train's workers."""
