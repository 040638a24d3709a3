"""Turns the rows of a file into groups: a prompt and its completions. Standard library only."""
