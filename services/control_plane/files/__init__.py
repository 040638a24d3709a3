"""Stores uploaded files, which arrive whole or in parts, and checks the rows of training files."""
