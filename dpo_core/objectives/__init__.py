"""Computes the loss of each training objective (such as DPO), and the metrics of each training step."""
