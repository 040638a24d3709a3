"""Base models and trained policies: names, sharing, deployments, inference."""
