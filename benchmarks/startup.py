"""Seconds from the command to the first finished training step.

  python benchmarks/startup.py [--rounds 5]

'ours' is `train.py` on the embedded digits, which never imports TensorFlow, from its second start on;
'without_cache' compiles anew, and 'sequential' also imports TensorFlow and TFDS first, as usual scripts do.
They are timed in turn; the last line is one JSON object with the medians.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARGUMENTS = ['--config=configs/digits.py', '--config.total_steps=500', '--config.log_every_steps=1']


def seconds_to_first_step(command: list[str], environment: dict[str, str]) -> float:
  """Starts the command, waits for the line of its first step, and returns the seconds until then."""
  start = time.perf_counter()
  with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if line.startswith('step 1/'):
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
  raise RuntimeError(f'{command} ended with {process.returncode} before its first step')


SEQUENTIAL = """
import tensorflow, tensorflow_datasets
import alexnet_flax.data.loader
from alexnet_flax.cli.train import main
import sys
sys.exit(main(['train.py', *sys.argv[1:]]))
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  rounds = parser.parse_args().rounds
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '3'}
  no_cache = [*ARGUMENTS, '--config.compilation_cache=false']
  programs = {
    'ours': ['train.py', *ARGUMENTS],
    'without_cache': ['train.py', *no_cache],
    'sequential': ['-c', SEQUENTIAL, *no_cache],
  }
  times: dict[str, list[float]] = {name: [] for name in programs}
  for number in range(rounds + 1):
    for name, program in programs.items():
      with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, *program, f'--workdir={workdir}']
        seconds = seconds_to_first_step(command, environment)
      if number:  # the first round fills both caches and prepares the digits
        times[name].append(seconds)
        print(f'round {number}: {name} {seconds:.2f} s', flush=True)
  print(json.dumps({name: round(statistics.median(values), 2) for name, values in times.items()}))


if __name__ == '__main__':
  main()
