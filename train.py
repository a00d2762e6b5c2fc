"""Trains an AlexNet: `python train.py --config=configs/digits.py`. Alone, it says what to type."""

import sys

from alexnet_flax.command_line import main

if __name__ == '__main__':
  sys.exit(main(sys.argv))
