"""What an attempt tells the outside: events, logs, spans, and other trackers."""
