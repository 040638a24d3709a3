"""A model that computes log-probs of completions: packs, attention, head."""
