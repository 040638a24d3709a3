"""The REST API, the truth about jobs, and the reconciler. No torch and no ray: it speaks HTTP to the cluster."""
