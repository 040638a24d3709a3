"""What runs inside Ray Serve: one vLLM application per model, which answers and scores."""
