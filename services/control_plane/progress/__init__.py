"""A job's events, metrics and logs, as clients follow them."""
