"""Answers requests for completions.

Requests go to engines (the servers of models on Ray Serve), streamed answers are passed on, and tokens are counted.
"""
