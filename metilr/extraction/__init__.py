"""From images to descriptors on disk."""
