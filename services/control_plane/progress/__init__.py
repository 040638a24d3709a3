"""Serves a job's events, metrics and logs to clients that follow the job."""
