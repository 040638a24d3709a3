"""Computes the log-probabilities of the reference, the frozen model that training compares with.

They come from the model's deployment in vLLM or from the trainer's own forward pass; a sample of both is compared.
"""
