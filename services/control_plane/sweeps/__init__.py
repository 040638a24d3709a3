"""Runs sweeps: many jobs that differ in chosen options, which the service submits one after the other, compares and
stops early if they are hopeless.
"""
