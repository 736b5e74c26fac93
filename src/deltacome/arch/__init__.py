"""Checkpoints and model families, without importing transformers."""
