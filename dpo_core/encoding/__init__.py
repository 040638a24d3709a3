"""Turns a group of texts into token ids."""
