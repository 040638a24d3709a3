"""Commands about projects: their API keys, usage, audit log and webhooks."""
