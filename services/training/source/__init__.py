"""Fetches training files from URIs and the Hugging Face hub."""
