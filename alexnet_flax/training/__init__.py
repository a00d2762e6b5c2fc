"""Runs: from a configuration to checkpoints, logs and a trained network."""
