"""What all requests go through: limits, the check of the key, idempotency and the access log."""
