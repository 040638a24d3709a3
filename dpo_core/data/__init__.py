"""Turns the rows of a file into groups: a group is a prompt and its completions. Uses only the standard library."""
