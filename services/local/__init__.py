"""Runs PostgreSQL and a Ray head node on this machine, for the command `raydpo up`."""
