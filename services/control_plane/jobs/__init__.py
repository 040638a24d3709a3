"""Fine-tuning jobs: their requests, their states, and how clients see them."""
