"""Finds out who sends a request, and what the request's key allows."""
