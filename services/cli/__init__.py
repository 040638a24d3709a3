"""The `raydpo` command: `up` runs the service on this machine, all else speaks to its REST API."""
