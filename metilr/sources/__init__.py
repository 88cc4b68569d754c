"""Where a museum's images are, which exhibits they show, and what is said of those: a folder, a table, IIIF."""
