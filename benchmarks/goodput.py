"""Goodput: the share of the time in which a run makes steps that last, if it is killed every T seconds.

  python benchmarks/goodput.py [--kill-every 60] [--seconds 300] [--periods 5,20,80,320]

For each checkpoint period (in steps), a run is started, killed by SIGKILL after T seconds, started again, and
so on. Its goodput is the steps of its last checkpoint, at the speed of an undisturbed run, as a share of the
whole time. Beside it stands what the model of Young (1974) and Daly (2006) says with the measured costs of a
start, a step and a save, and the period that is best by their formula, sqrt(2 x save x (T + start)) - save.
The last line is one JSON object.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

from alexnet_flax.checkpoint import steps_in

_ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = (
  '--config=configs/digits.py',
  '--config.model.width=0.25',
  '--config.optimizer.warmup_steps=10',
  '--config.eval_every_steps=1000000',
  '--config.log_every_steps=20',
  '--config.report=false',
)


def start(folder: pathlib.Path, period: int, steps: int) -> subprocess.Popen:
  """Starts the run, or goes on with it."""
  more = f'--workdir={folder}', f'--config.checkpoint_every_steps={period}', f'--config.total_steps={steps}'
  return subprocess.Popen(
    [sys.executable, 'train.py', *FLAGS, *more],
    cwd=_ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def saved(folder: pathlib.Path) -> int:
  """Returns the steps of the last complete checkpoint."""
  return max(steps_in(folder / 'checkpoints'), default=0)


def costs(folder: pathlib.Path) -> tuple[float, float, float]:
  """Returns the seconds of a start, a step and a save, by undisturbed runs of several lengths."""

  def seconds(name: str, period: int, steps: int) -> float:
    begin = time.monotonic()
    if start(folder / name, period, steps).wait():
      sys.exit('error: the run failed; run train.py by hand with these flags')
    return time.monotonic() - begin

  seconds('warm', 400, 40)  # compiles
  short, long, often = seconds('short', 400, 40), seconds('long', 400, 400), seconds('often', 10, 400)
  step = (long - short) / 360
  return short - 40 * step, step, max(often - long, 1e-3) / 39


def goodput(
  folder: pathlib.Path, period: int, kill_every: float, total: float, step: float
) -> tuple[float, int]:
  """Returns the share of lasting steps, and the number of kills."""
  begin, kills = time.monotonic(), 0
  while (left := total - (time.monotonic() - begin)) > 0:
    process = start(folder, period, 1 << 20)
    try:
      process.wait(min(kill_every, left))
      sys.exit('error: the run ended by itself; run train.py by hand with these flags')
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      kills += 1
  return saved(folder) * step / (time.monotonic() - begin), kills


def modelled(period: int, kill_every: float, start_up: float, step: float, save: float) -> float:
  """Returns the share by the model: between two kills, whole periods of steps and a save after the start."""
  whole = max(kill_every - start_up, 0.0) // (period * step + save)
  return whole * period * step / kill_every


def main() -> None:
  """Prints the costs, a table, and one JSON object."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
  parser.add_argument('--kill-every', type=float, default=60.0, help='seconds')
  parser.add_argument('--seconds', type=float, default=300.0, help='for each period')
  parser.add_argument('--periods', default='5,20,80,320', help='steps between checkpoints')
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    start_up, step, save = costs(root)
    print(f'a start takes {start_up:.1f} s, a step {step * 1e3:.1f} ms, a save {save * 1e3:.0f} ms')
    print('steps between checkpoints   goodput   by the model   kills')
    found = {}
    for period in map(int, options.periods.split(',')):
      share, kills = goodput(root / f'every{period}', period, options.kill_every, options.seconds, step)
      expected = modelled(period, options.kill_every, start_up, step, save)
      found[period] = round(share, 4)
      print(f'{period:25}   {share:7.1%}   {expected:12.1%}   {kills:5}', flush=True)
  daly = math.sqrt(2 * save * (options.kill_every + start_up)) - save
  best = max(found, key=lambda period: found[period])
  print(f'best of these: every {best} steps; by Daly every {daly / step:.0f} ({daly:.1f} s)')
  result = {'start_s': start_up, 'step_s': step, 'save_s': save, 'kill_every_s': options.kill_every}
  print(json.dumps(result | {'goodput': found, 'daly_steps': daly / step}))


if __name__ == '__main__':
  main()
