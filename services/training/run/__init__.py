"""The worker processes that train."""
