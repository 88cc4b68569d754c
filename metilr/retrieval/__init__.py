"""Arrays only: whitening, search and the kNN classifier."""
