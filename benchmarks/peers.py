"""Runs each program in its own process and times them in turn, so that noise affects all alike.

A worker is an entry of a file's `PEERS`: a function that returns another, which does a number of units of
work. Before each round, a worker also does the file's `WARM_UNITS`, if defined.
"""

import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

_HERE = pathlib.Path(__file__).resolve()


class Worker:
  """A peer in its own process; absent if its imports fail."""

  def __init__(self, file: str, name: str, python: str, **arguments: object):
    self.name = name
    command = [python, str(_HERE), str(_HERE.parent / file), name, json.dumps(arguments)]
    environment = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'PYTHONPATH': str(_HERE.parent.parent)}
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    reply = json.loads(self._read())
    self.absent = reply.get('absent')
    self.wall_seconds: list[float] = []
    self.cpu_seconds: list[float] = []
    self.peak_mb = 0

  def seconds(self, times: int) -> float:
    """Returns the duration of `times` units of work; notes it, their CPU time, and the most memory so far."""
    assert self._process.stdin is not None
    self._process.stdin.write(f'{times}\n')
    self._process.stdin.flush()
    reply = json.loads(self._read())
    self.wall_seconds.append(reply['seconds'])
    self.cpu_seconds.append(reply['cpu_seconds'])
    self.peak_mb = reply['peak_mb']
    return reply['seconds']

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()

  def _read(self) -> str:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      if line.startswith('{'):
        return line
    raise RuntimeError(f'the worker {self.name} ended: {self._process.wait()}')


def compare(workers: list[Worker], units: int, rounds: int) -> dict[str, float | None]:
  """Returns the median over `rounds` of the seconds for `units` of work, by name; None for an absent peer."""
  present = [worker for worker in workers if not worker.absent]
  for worker in workers:
    if worker.absent:
      print(f'{worker.name}: absent ({worker.absent})')
  times: dict[str, list[float]] = {worker.name: [] for worker in present}
  for number in range(rounds):
    for worker in present:
      times[worker.name].append(worker.seconds(units))
    shown = ', '.join(f'{name} {values[-1]:.2f} s' for name, values in times.items())
    print(f'round {number + 1}: {shown}', flush=True)
  for worker in workers:
    worker.close()
  return {w.name: statistics.median(times[w.name]) if w.name in times else None for w in workers}


def _serve(file: str, name: str, arguments: str) -> None:
  spec = importlib.util.spec_from_file_location('worker', file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    work = module.PEERS[name](**json.loads(arguments))
  except ImportError as error:
    print(json.dumps({'absent': str(error)}), flush=True)
    return
  warm = getattr(module, 'WARM_UNITS', 2)
  work(warm)
  print(json.dumps({'ready': name}), flush=True)
  for line in sys.stdin:
    if hasattr(module, 'WARM_UNITS'):
      work(warm)
    start, cpu_start = time.perf_counter(), time.process_time()
    work(int(line))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({'seconds': seconds, 'cpu_seconds': cpu_seconds, 'peak_mb': peak_mb}), flush=True)


if __name__ == '__main__':
  _serve(*sys.argv[1:])
