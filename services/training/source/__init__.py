"""Training files from URIs and hubs."""
