"""Trains a policy: gradients, optimizer, ranks, checkpoints."""
