"""Runs models in Ray Serve, each in its own application.

A model that generates text runs in vLLM. The same engine computes the log-probabilities of given completions. A reward
model runs in plain torch and scores completions.
"""
