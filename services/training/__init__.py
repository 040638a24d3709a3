"""What runs inside a Ray job: one driver, Ray Data, and the Ray Train workers."""
