"""Training of tokenizer and transformer."""
