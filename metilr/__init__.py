"""Instance-level recognition of artworks: which exhibit a photo shows, and how sure that is."""

__version__ = "0.1.0"
