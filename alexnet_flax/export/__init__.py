"""PretrainedModel networks for other programs."""
