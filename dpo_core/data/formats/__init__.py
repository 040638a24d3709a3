"""Recognizes the format of a row of preference data, and turns the row into groups. A group is a prompt with its
completions."""
