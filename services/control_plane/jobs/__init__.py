"""Fine-tuning jobs: their request bodies, the checks of new jobs, their states, and their JSON objects."""
