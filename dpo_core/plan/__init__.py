"""Answers whether a run will fit into memory, before it runs and without torch."""
