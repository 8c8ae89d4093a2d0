"""GGUF files: read as a model, and written of one."""
