"""Fine-tuning jobs: their request bodies, state changes and JSON objects."""
