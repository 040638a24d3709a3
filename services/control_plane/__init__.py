"""The control plane: the REST API, the database of jobs, and the reconciler. It imports no torch and no ray."""
