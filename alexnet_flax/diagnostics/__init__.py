"""Checks of a machine and a recipe, a preview of a batch, and a test of resuming."""
