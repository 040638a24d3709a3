"""Starts, follows and ends attempts, which are executions of a job on the Ray cluster."""
