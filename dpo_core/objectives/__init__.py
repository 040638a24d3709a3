"""Computes the loss of each objective, and the metrics of each training step."""
