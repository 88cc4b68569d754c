"""Whether a data set is honest and a collection clean: copies, leaks, doubtful labels, images to look at."""
