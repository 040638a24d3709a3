"""What is minimized: the losses and their metrics."""
