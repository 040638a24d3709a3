"""Starts, follows and ends attempts. An attempt is one run of a job on the Ray cluster."""
