"""Computes the log-probabilities of the reference, the frozen model with which the trained model is compared.

Either the reference's deployment in vLLM or the trainer's own forward pass computes the log-probabilities. Before the
deployment is used, both compute a sample, and the results are compared.
"""
