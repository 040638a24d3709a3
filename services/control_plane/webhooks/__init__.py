"""Webhook endpoints, and the outbox that delivers to them."""
