"""Held-out pairs: scored one by one, summed up with intervals."""
