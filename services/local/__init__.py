"""The embedded stack: PostgreSQL and a Ray head on this machine, for `raydpo up`."""
