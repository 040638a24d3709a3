"""Sends an attempt's events, logs, traces and metrics to storage, the control plane and other services."""
