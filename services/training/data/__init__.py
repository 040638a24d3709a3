"""Encodes training rows as token ids, stores the ids, and reads them in batches for every step."""
