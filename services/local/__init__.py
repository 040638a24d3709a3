"""Runs PostgreSQL and a Ray head node on this machine for `raydpo up`."""
