"""Runs all benchmarks small, compares their ratios with the stored ones, and says what got worse.

  python benchmarks/bench.py [--only train_step startup ...] [--store]

Ratios are to a peer of the same run, so that those of another machine are comparable; --store writes them
to benchmarks/stored.json. The exit code is 1 if a ratio is worse than the stored one by more than its margin.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
STORED = HERE / 'stored.json'


class Benchmark(NamedTuple):
  """A small run of a benchmark, and the ratios to take from its JSON; greater is better."""

  arguments: tuple[str, ...]
  ratios: Callable[[dict[str, Any]], dict[str, float | None]]
  margin: float  # a smaller part of the stored ratio is worse


def _to(found: dict[str, Any], peer: str, *names: str) -> dict[str, float | None]:
  return {f'{name} / {peer}': found[name] and found[peer] and found[name] / found[peer] for name in names}


_FORMS = ('originals', 'prepared', 'raw')  # of our input
BENCHMARKS = {
  'train_step': Benchmark(
    ('--rounds=3', '--steps=1', '--only', 'ours', 'plain_linen', 'keras'),
    lambda found: _to(found, 'plain_linen', 'ours') | _to(found, 'keras', 'ours'),
    0.85,
  ),
  'input_pipeline': Benchmark(
    ('--rounds=2', '--batches=24', '--memory-batches=0'),
    lambda found: _to(found, 'usual_jax', *(name for name in found if name.startswith(_FORMS))),
    0.75,
  ),
  'startup': Benchmark(
    ('--rounds=2',), lambda found: {'sequential / ours': found['sequential'] / found['ours']}, 0.7
  ),
  'scaling': Benchmark(
    ('--few',),
    lambda found: {
      f'1 / exponent of {of} by {name}': 1 / found[name][of]
      for name in ('batch', 'width', 'size')
      for of in ('seconds', 'bytes')
    },
    0.6,
  ),
  'chaos': Benchmark(('--kills=2',), lambda found: {'equal / kills': found['equal'] / found['kills']}, 1.0),
}


def main() -> int:
  """Runs the benchmarks; returns 1 if one got worse."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--only', nargs='+', choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
  parser.add_argument('--store', action='store_true')
  arguments = parser.parse_args()
  stored = json.loads(STORED.read_text()) if STORED.exists() else {}
  worse = []
  for name in arguments.only:
    benchmark, before = BENCHMARKS[name], stored.get(name, {})
    command = [sys.executable, HERE / f'{name}.py', *benchmark.arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = benchmark.ratios(json.loads(done.stdout.splitlines()[-1]))
    ratios = {key: value for key, value in found.items() if value}  # of peers that are installed
    for key, value in ratios.items():
      known = before.get(key)
      print(f'{name}: {key} {value:.2f}' + (f' (stored: {known:.2f})' if known else ''), flush=True)
      if known and value < benchmark.margin * known:
        worse.append(f'{name}: {key} is {value:.2f}, and was {known:.2f}')
    stored[name] = {key: round(value, 3) for key, value in ratios.items()}
  if arguments.store:
    STORED.write_text(json.dumps(stored, indent=2) + '\n')
  print('\n'.join(['worse:', *worse] if worse else ['nothing got worse']))
  return 1 if worse else 0


if __name__ == '__main__':
  sys.exit(main())
