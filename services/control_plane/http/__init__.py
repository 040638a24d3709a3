"""The HTTP layer around the routes: limits, authentication, idempotency and the access log."""
