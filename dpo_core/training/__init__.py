"""The training loop: gradients, optimizer, ranks, checkpoints."""
