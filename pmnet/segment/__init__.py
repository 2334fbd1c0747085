"""Segmentation of one's own images."""
