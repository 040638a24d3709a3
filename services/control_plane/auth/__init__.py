"""Who sends a request, and what the key allows."""
