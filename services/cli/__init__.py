"""The `raydpo` command: `raydpo up` runs the service; the commands for jobs, files and models call its REST API."""
