"""The code that runs in a Ray job: one driver, Ray Data tasks, and Ray Train workers."""
