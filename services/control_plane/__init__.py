"""The control plane: the REST API, the database of jobs, and the reconciler.

Nothing in this package imports torch or ray.
"""
