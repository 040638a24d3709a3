"""Does for every HTTP request what does not depend on its route: limits, authentication, idempotency, errors and the
access log.
"""
