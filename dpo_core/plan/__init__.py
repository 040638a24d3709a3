"""Computes whether a training run fits into memory, before the run starts and without importing torch."""
