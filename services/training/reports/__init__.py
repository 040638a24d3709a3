"""Sends an attempt's events, logs, traces and metrics to the outside."""
