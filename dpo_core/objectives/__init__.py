"""Computes the losses of the objectives, and metrics of a step."""
