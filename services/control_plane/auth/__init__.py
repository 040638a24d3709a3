"""Authenticates the sender of a request, and checks the scopes of the request's key."""
