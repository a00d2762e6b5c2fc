"""Rewrites data sets with smaller images, and computes the principal components of their colours."""
