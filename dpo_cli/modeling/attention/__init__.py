"""Attention over prefix trees: the tree that is read, the kernels that compute it, and what transformers asks."""
