"""Improves a policy in rounds: in each round, the policy's own answers are scored, become training data, and train the
next policy.
"""
