"""The REST API: each route checks its input, asks a noun, and shapes the answer."""
