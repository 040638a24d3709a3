"""Finds out who sends a request, and checks that the sender's API key has the scope (permission) that the request
needs.
"""
