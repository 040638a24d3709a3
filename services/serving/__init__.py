"""Runs models in Ray Serve: one vLLM application per model, which answers requests and scores completions."""
