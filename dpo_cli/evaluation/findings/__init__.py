"""The diagnosis of a run: what its rows show, from the first step on, and what to do about it."""
