"""Stores files and uploads, and checks the rows of training files."""
