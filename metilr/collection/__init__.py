"""A museum's own images, made ready to answer photos."""
