"""Pairs become token ids: the chat template, the encoder, the completion mask, the length rule."""
