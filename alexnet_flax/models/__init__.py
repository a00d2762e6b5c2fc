"""Networks as data, and the linen module that walks them."""
