"""Manages projects (the tenants of the service), their API keys, limits and usage, and the audit log."""
