"""Evaluation of trained networks on data sets."""
