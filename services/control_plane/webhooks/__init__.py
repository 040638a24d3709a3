"""Webhook endpoints, and the outbox from which messages are sent to them."""
