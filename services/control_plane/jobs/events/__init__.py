"""The events of jobs: their history as users read it, and the blocks (compact tables) that keep the metrics of past
training steps."""
