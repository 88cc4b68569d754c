"""A local page to try a collection in the browser."""
