"""Limits on requests: their size, speed and number, for each API key and for all requests together."""
