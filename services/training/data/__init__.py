"""Encodes rows as token ids, stores them, and reads them in batches for every step."""
