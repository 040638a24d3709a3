"""Commands about the service itself: running it, and listing its settings."""
