"""Manages webhook endpoints, and sends messages to the endpoints from the outbox, a table of the database."""
