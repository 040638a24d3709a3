"""Preference optimization in plain torch. Knows no cluster and no web."""
