"""Manages webhook endpoints (URLs of users), and sends messages about jobs to them."""
