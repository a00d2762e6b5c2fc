"""Tools that examine a recipe, a batch or a resume."""
