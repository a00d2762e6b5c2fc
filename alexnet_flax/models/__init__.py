"""Network specifications, and the linen module that builds them."""
