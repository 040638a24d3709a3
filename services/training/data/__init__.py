"""From rows to ids, and from ids to the batches of every step."""
