"""Manages projects, API keys, quotas and the audit log."""
