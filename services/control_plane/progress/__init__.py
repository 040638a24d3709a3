"""Shows clients how a job goes on: its events as a stream, its metrics, and its logs."""
