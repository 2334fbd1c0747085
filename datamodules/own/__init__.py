"""Images of one's own, and synthetic ones."""
