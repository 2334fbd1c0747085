"""Datasets of the user's own images, and the synthetic ones."""
