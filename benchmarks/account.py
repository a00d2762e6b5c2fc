"""Where the milliseconds of a step go, layer by layer: ours beside Keras's.

  python benchmarks/account.py [--batch 32] [--network paper] [--forward]

Each program of `train_step.py` makes a few steps in its own process, under its profiler. At every moment the
operations that run share the time, and a moment in which none runs is `waiting`: so the rows add up to the
step. What an operation is part of, its name tells: ours by XLA's metadata, Keras's by the graph's nodes.
Prints ms a step, forward and (+) backward, as a table in Markdown.
"""

import argparse
import collections
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import train_step

PROGRAMS = ('ours', 'keras')
STEPS = 5
KINDS = {'relu': 'activations', 'pool': 'pools', 'norm': 'norms', 'bn': 'norms', 'drop': 'dropout'}
LAYER = re.compile(r'(conv\d|fc\d|relu|pool|norm|bn|drop)')


class Operation(NamedTuple):
  """What ran, as its program calls it, and when it began and ended, in ms."""

  name: str
  start: float
  end: float


def shares(operations: Iterable[Operation]) -> dict[str, float]:
  """Divides each moment among the operations that run; returns the ms of each.

  >>> sorted(shares([Operation('a', 0, 2), Operation('b', 1, 3), Operation('b', 4, 5)]).items())
  [('a', 1.5), ('b', 2.5), ('waiting', 1.0)]
  """
  changes = sorted(
    change for name, *times in operations for change in zip(times, (1, -1), (name, name), strict=True)
  )
  running: collections.Counter[str] = collections.Counter()
  found: dict[str, float] = collections.defaultdict(float)
  before = changes[0][0]
  for now, change, name in changes:
    for other, count in (+running or {'waiting': 1}).items():
      found[other] += (now - before) * count / max(1, running.total())
    running[name] += change
    before = now
  return {name: ms for name, ms in found.items() if ms}


def operations(folder: str, part: Callable[[str], str | None]) -> Iterator[Operation]:
  """Yields the operations of a profile, each as a part of the network; those within another are its own."""
  from jax.profiler import ProfileData

  (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
  for plane in ProfileData.from_file(path).planes:
    for line in plane.lines:
      end = 0.0
      for event in sorted(line.events, key=lambda event: event.start_ns):
        if event.start_ns >= end and event.duration_ns and (name := part(event.name)):
          end = event.start_ns + event.duration_ns
          yield Operation(name, event.start_ns / 1e6, end / 1e6)


def layer(name: str, is_backward: bool) -> str | None:
  """Returns the row of an operation whose name holds that of a layer; None if it holds none."""
  if not (layers := LAYER.findall(name)):
    return None
  return KINDS.get(layers[-1], layers[-1]) + ('+' if is_backward else '')


def ours(work: Callable[[int], None], folder: str) -> dict[str, float]:
  """Traces our steps; `folder` also holds the compiled programs, in whose metadata the layers stand."""
  import jax

  with jax.profiler.trace(folder):
    work(STEPS)
  parts = {}
  for path in glob.glob(f'{folder}/*after_optimizations.txt'):
    with open(path) as file:
      for name, where in re.findall(r'^ *(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', file.read(), re.M):
        update = 'update' if where.endswith('/add') else 'rest'
        parts[name] = layer(where, 'transpose(' in where) or update
  return shares(operations(folder, parts.get))


def keras(work: Callable[[int], None], folder: str) -> dict[str, float]:
  """Traces Keras's steps."""
  import tensorflow as tf

  with tf.profiler.experimental.Profile(folder):
    work(STEPS)

  def part(name: str) -> str | None:
    if not re.fullmatch(r'[^ :]+:\w+', name):
      return None
    return layer(name, 'gradient' in name) or ('update' if 'sgd' in name else 'rest')

  return shares(operations(folder, part))


def trace(program: str, network: str, batch: int, forward: bool) -> dict[str, float]:
  """Returns the ms of each part of a step of one program."""
  with tempfile.TemporaryDirectory() as folder:
    os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} --xla_dump_to={folder} --xla_dump_hlo_as_text'
    )
    work = train_step.PEERS[program](network, batch, forward)
    work(2)
    found = {'ours': ours, 'keras': keras}[program](work, folder)
  return {name: ms / STEPS for name, ms in found.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--network', choices=tuple(train_step.WIDTHS), default='paper')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--forward', action='store_true', help='prediction alone')
  parser.add_argument('--one', choices=PROGRAMS, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.one:
    print(json.dumps(trace(arguments.one, arguments.network, arguments.batch, arguments.forward)))
    return
  found = {}
  for name in PROGRAMS:
    command = [sys.executable, __file__, *sys.argv[1:], '--one', name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found[name] = json.loads(done.stdout.splitlines()[-1])
  rows = sorted({name.rstrip('+') for parts in found.values() for name in parts})
  print('| |', *(f'{name} |' for name in PROGRAMS))
  print('|---|---|---|')
  total = {name: sum(parts.values()) for name, parts in found.items()}
  for row in rows:
    cells = (
      ' + '.join(f'{parts[key]:.0f}' for key in (row, f'{row}+') if key in parts) for parts in found.values()
    )
    print(f'| {row} |', *(f'{cell} |' for cell in cells))
  print('| the step |', *(f'{total[name]:.0f} |' for name in PROGRAMS))


if __name__ == '__main__':
  main()
