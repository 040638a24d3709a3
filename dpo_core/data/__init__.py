"""Turns the rows of a file into groups. A group is a prompt with its completions. Uses only the standard library."""
