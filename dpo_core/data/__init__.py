"""From a row of a file to a group: a prompt and its completions. Standard library only."""
