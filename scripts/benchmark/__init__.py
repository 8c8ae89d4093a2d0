"""Measure this program: beside TRL on the same work, and by itself. `make bench`, `make bench-saving` … start it."""
