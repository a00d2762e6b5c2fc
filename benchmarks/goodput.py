"""Goodput: the share of the time in which a run makes steps that last, if it is killed every T seconds.

  python benchmarks/goodput.py [--kill-every 60] [--seconds 300] [--periods 5,20,80,320]

For each checkpoint period (in steps), a run is started, killed by SIGKILL after T seconds, started again, and
so on, the periods and undisturbed runs in turn, so that other load affects all alike. Its goodput is the
steps of its last checkpoint, at the speed of an undisturbed run, as a share of its time. Beside it stands
what a model says by the measured costs of a start, a step and a save, and the periods that are best by the
formulas of Young (1974), sqrt(2 x save x T), and of Daly (2006), sqrt(2 x save x (T + start)) - save. A save
costs the time of the steps that the shortest period made less than the longest. The last line is one JSON
object.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from alexnet_flax.checkpoint import steps_in
from alexnet_flax.training.logger import read_metrics

_ROOT = pathlib.Path(__file__).resolve().parents[1]
LOG_EVERY = 5  # steps
STEPS = 80  # of an undisturbed run
FLAGS = (
  '--config=configs/digits.py',
  '--config.model.width=0.25',
  '--config.optimizer.warmup_steps=10',
  '--config.eval_every_steps=1000000',
  f'--config.log_every_steps={LOG_EVERY}',
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


def reached(folder: pathlib.Path) -> int:
  """Returns the last step of the log."""
  lines = read_metrics(folder) if (folder / 'metrics.jsonl').exists() else []
  return max((line['step'] for line in lines), default=0)


def undisturbed(folder: pathlib.Path) -> tuple[float, list[float]]:
  """Returns the seconds to the first log line of a run of `STEPS`, and those between its log lines."""
  begin, log = time.monotonic(), folder / 'metrics.jsonl'
  process = start(folder, STEPS, STEPS)
  while process.poll() is None and not (log.exists() and log.stat().st_size):
    time.sleep(0.02)
  first = time.monotonic() - begin
  if process.wait():
    sys.exit('error: the run failed; run train.py by hand with these flags')
  times = sorted({line['seconds'] for line in read_metrics(folder) if line['split'] == 'train'})
  return first, [after - before for before, after in itertools.pairwise(times)]


def live(folder: pathlib.Path, period: int, seconds: float) -> int:
  """Starts the run, or goes on with it, kills it after so many seconds, and returns the steps made."""
  begun, process = saved(folder), start(folder, period, 1 << 20)
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  else:
    sys.exit('error: the run ended by itself; run train.py by hand with these flags')
  return max(reached(folder) - begun, 0)


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
  periods = sorted({int(period) for period in options.periods.split(',')})
  if len(periods) < 2:
    parser.error('--periods needs two or more')
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    undisturbed(root / 'warm')  # compiles
    kills = max(round(options.seconds / options.kill_every), 1)
    made = dict.fromkeys(periods, 0)
    firsts, between = [], []
    for number in range(kills):
      seconds, more = undisturbed(root / f'alone{number}')
      firsts.append(seconds)
      between += more
      for period in periods:
        made[period] += live(root / f'every{period}', period, options.kill_every)
      print(f'kill {number + 1} of {kills}: steps made {made}', flush=True)
    step = statistics.median(between) / LOG_EVERY
    start_up = statistics.median(firsts) - LOG_EVERY * step
    often, seldom = periods[0], periods[-1]
    saves = made[often] / often - made[seldom] / seldom  # which took the time of the steps that are missing
    save = max((made[seldom] - made[often]) * step / max(saves, 1), 1e-3)
    whole = kills * options.kill_every
    found = {period: round(saved(root / f'every{period}') * step / whole, 4) for period in periods}
  print(f'a start takes {start_up:.1f} s, a step {step * 1e3:.1f} ms, a save {save * 1e3:.0f} ms')
  print('steps between checkpoints   goodput   by the model')
  for period, share in found.items():
    expected = modelled(period, options.kill_every, start_up, step, save)
    print(f'{period:25}   {share:7.1%}   {expected:12.1%}')
  young = math.sqrt(2 * save * options.kill_every)
  daly = math.sqrt(2 * save * (options.kill_every + start_up)) - save
  best = max(found, key=lambda period: found[period])
  print(f'best of these: every {best} steps; by Young every {young / step:.0f}, by Daly {daly / step:.0f}')
  result = {'start_s': start_up, 'step_s': step, 'save_s': save, 'kill_every_s': options.kill_every}
  print(json.dumps(result | {'goodput': found, 'young_steps': young / step, 'daly_steps': daly / step}))


if __name__ == '__main__':
  main()
