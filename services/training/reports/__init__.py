"""Sends the reports, logs, traces and metrics of an attempt (one run of a job) to storage and to other programs."""
