"""Backbones, pooling and the embedder that joins them."""
