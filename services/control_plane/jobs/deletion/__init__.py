"""Deletes jobs that have ended, and removes files of ended jobs that nobody needs any more."""
