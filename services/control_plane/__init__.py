"""The control plane: the server with the REST API, the database of jobs, and the loop that runs jobs on Ray.

Nothing in this package imports torch or ray.
"""
