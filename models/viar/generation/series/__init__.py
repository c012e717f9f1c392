"""Many images in a folder, the same whatever makes them."""
