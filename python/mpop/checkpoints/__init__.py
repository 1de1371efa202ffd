"""Checkpoints on disk: written, read, refused; the hooks of transformers that do it."""
