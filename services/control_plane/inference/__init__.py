"""Answers completions: forwards them to the engines of models, passes streams on, and counts tokens."""
