"""Trained networks scored on data sets."""
