"""Trains a policy: gradients, optimizer steps, communication between ranks, and checkpoints."""
