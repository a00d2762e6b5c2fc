"""Data sets written anew with smaller images, and the principal components of their colours."""
