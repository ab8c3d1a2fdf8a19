"""Whatever says how good an image, or a half-made one, is."""
