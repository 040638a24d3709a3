"""What happens to every HTTP request around its route: limits, authentication, idempotency, errors and the access
log."""
