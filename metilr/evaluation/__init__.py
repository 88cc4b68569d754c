"""From descriptors to answers, figures and results."""
