"""Fine-tuning jobs: what a request asks for, and what a client is shown."""
