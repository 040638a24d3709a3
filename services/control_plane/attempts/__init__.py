"""Attempts of jobs: when one starts, what it reports, when it is over."""
