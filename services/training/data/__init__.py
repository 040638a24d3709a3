"""Encodes the rows of training files as token ids, stores the ids, and reads them in batches for every training
step."""
