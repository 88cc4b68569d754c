"""What there is to see: ground truth, folders, decoding, views and simulated visits."""
