"""From a group to token ids."""
