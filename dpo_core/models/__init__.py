"""Models on disk: load, adapt, check, save."""
