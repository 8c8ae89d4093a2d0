"""Rows become pairs: sources, dataset shapes, conversations, ranked and labelled answers."""
