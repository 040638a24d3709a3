"""Attempts of jobs: when one starts, what it reports, and when it ends."""
