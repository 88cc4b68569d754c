"""What a reader sees: the table, the plots, the report page, published figures, and the run in Weights & Biases."""
