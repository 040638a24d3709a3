"""The events of jobs: their history as users read it, and the compact blocks that keep the metrics of past steps."""
