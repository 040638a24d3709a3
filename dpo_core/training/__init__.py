"""Trains a model (the policy): computes gradients, takes optimizer steps, exchanges data between processes, and writes
checkpoints."""
