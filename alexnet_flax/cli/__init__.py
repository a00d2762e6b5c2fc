"""The commands: `train.py` and the verbs of `alexnet-flax`."""
