"""Hugging Face Trainer: the second pass that its loop has no place for."""
