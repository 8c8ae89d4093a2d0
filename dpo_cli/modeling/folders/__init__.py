"""A name, a folder or a GGUF file becomes a model and its tokenizer; both become a folder again."""
