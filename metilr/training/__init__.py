"""Contrastive fine-tuning."""
