"""Defines the `raydpo` command: `raydpo up` runs the service; most other commands call the service's REST API."""
