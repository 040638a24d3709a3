"""What every request passes: limits, the caller's key, idempotency, the access log."""
