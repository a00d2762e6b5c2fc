"""Trains an AlexNet: `python train.py --config=configs/digits.py`. `--help` prints the usage."""

import os
import signal
import sys


def main() -> int:
  """Runs the command; returns its exit code."""
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
      signal.signal(number, lambda *_: os._exit(75))  # before the run's own handlers nothing is to be saved
  from alexnet_flax.cli import train

  return train.main(sys.argv)


if __name__ == '__main__':
  sys.exit(main())
