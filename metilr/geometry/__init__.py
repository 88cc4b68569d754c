"""Local features and what they prove about two images."""
