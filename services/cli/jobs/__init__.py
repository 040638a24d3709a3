"""Commands about jobs: creating and following them, planning them, and listing training methods."""
