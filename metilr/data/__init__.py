"""From files to batches: ground truth, images, transforms, the demo museum."""
