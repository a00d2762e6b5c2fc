"""`alexnet-flax verify-resume`: kills a run repeatedly and compares it with an uninterrupted run.

Both are the real program in separate processes. A kill is SIGKILL: at a random step, during a save, or during
start-up. After each kill the last complete checkpoint must be bit-identical to that of the uninterrupted run
at the same step; at the end, so must everything else.
"""

import collections
import contextlib
import dataclasses
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from alexnet_flax import checkpoint
from alexnet_flax.errors import UsageError
from alexnet_flax.files import read_lines
from alexnet_flax.training.logger import read_metrics

# Defaults, unless given on the command line: enough steps for several checkpoints and evaluations.
_SHORT = {
  'total_steps': 24,
  'optimizer.warmup_steps': 2,
  'checkpoint_every_steps': 4,
  'eval_every_steps': 12,
  'log_every_steps': 4,
}
_KILLS_PER_RUN = 5
_MISSES = 5  # runs that may end before they are killed
_TIMED = ('images_per_second',)
_EXAMPLES = 'examples-0.jsonl'
_PROGRAM = 'import sys; from alexnet_flax.cli.train import main; sys.exit(main(sys.argv))'


@dataclasses.dataclass
class Verification:
  """The results.

  Attributes:
    kills: The number of kills.
    inside_save: The number of kills that left an unfinished checkpoint behind.
    equal: The number of kills after which the run was bit-identical.
    differences: The differences, one per line.
    compared: The numbers of compared checkpoints, arrays, metric values and steps' examples.
  """

  kills: int = 0
  inside_save: int = 0
  equal: int = 0
  differences: list[str] = dataclasses.field(default_factory=list)
  compared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def verify_resume(
  flags: Sequence[str], kills: int, *, seed: int = 0, say: Callable[[str], None] = print
) -> Verification:
  """Kills a run `kills` times, and compares it with an uninterrupted one.

  Args:
    flags: `--config=FILE` and overrides, as for `train.py`. The default is a small number of steps.
    kills: The number of kills. A third of them waits for a save, a sixth strikes during start-up.
    seed: The seed of the random times.
    say: Receives lines about the progress.

  Raises:
    UsageError: The run itself fails.
  """
  given = {flag.lstrip('-').partition('=')[0].removeprefix('config.') for flag in flags}
  refused = sorted(given & {'workdir', 'show_batch', 'coordinator', 'processes', 'process_id'})
  if refused:
    raise UsageError(f'--{refused[0]} is not supported here: the runs use one process and temporary folders')
  short = [
    f'--config.{key}={value}'
    for key, value in _SHORT.items()
    if not given & {key, key.replace('_steps', '_epochs')}  # epochs replace steps
  ]
  kept = ['--config.record_examples=true', '--config.keep_checkpoints=100000', '--config.report=false']
  command = [sys.executable, '-c', _PROGRAM, *flags, *short, *kept]
  rng, result = random.Random(seed), Verification()
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    whole = root / 'whole'
    start = time.monotonic()
    _run(command, whole)
    saved = len(_steps(whole))
    if saved < 2 or not read_metrics(whole):
      raise UsageError('the run is too short to be interrupted: it needs two checkpoints and logged metrics')
    say(f'uninterrupted: {saved} checkpoints in {time.monotonic() - start:.0f} s')
    rounds = 0
    while result.kills < kills:
      rounds += 1
      if rounds > kills + _MISSES:
        raise UsageError(f'{rounds} runs ended before they could be killed; train for more steps')
      folder, before, good = root / f'killed-{rounds}', result.kills, 0
      while result.kills < min(before + _KILLS_PER_RUN, kills) and _kill(command, folder, whole, rng, result):
        wrong = _compare_latest(whole, folder)
        good += not wrong
        result.differences += wrong
        step = next(iter(_steps(folder)), None)
        state = 'no checkpoint yet' if step is None else f'last checkpoint at step {step}'
        say(f'kill {result.kills} of {kills}: {state}{"; DIFFERENT" if wrong else ""}')
      _run(command, folder)
      wrong = _compare(whole, folder, result)
      result.differences += wrong
      result.equal += 0 if wrong else good
      verdict = 'DIFFERENT' if wrong else 'bit-identical'
      say(f'run {rounds} finished after {result.kills - before} kills: {verdict}')
  return result


def _run(command: list[str], folder: pathlib.Path) -> None:
  """Runs the program to its end."""
  done = subprocess.run([*command, f'--workdir={folder}'], capture_output=True, text=True, check=False)
  if done.returncode:
    last = (done.stderr.strip() or 'no message').splitlines()[-1]
    raise UsageError(f'the run fails with exit code {done.returncode}: {last.removeprefix("error: ")}')


def _kill(
  command: list[str], folder: pathlib.Path, whole: pathlib.Path, rng: random.Random, result: Verification
) -> bool:
  """Runs the program and kills it; returns False if it ends before."""
  partial, log = _partial(folder), _examples_inode(folder)  # as the previous kill left them
  steps = len(read_lines(whole / _EXAMPLES))
  first = next(iter(_steps(folder)), 0) + 1
  last = min(first + steps // _KILLS_PER_RUN, steps)
  step, seconds = rng.randint(min(first, last), last), rng.uniform(0, 5)
  kind = ('step', 'step', 'save', 'start', 'step', 'save')[result.kills % 6]
  begin = time.monotonic()

  def is_time() -> bool:
    if kind == 'save':
      return bool(_partial(folder) - partial)
    if kind == 'start':
      return time.monotonic() - begin > seconds
    return _examples_inode(folder) != log and len(read_lines(folder / _EXAMPLES)) >= step

  with subprocess.Popen(
    [*command, f'--workdir={folder}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    while process.poll() is None and not is_time():
      time.sleep(0.001 if kind == 'save' else 0.01)
    time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
      return False
    process.kill()
  result.kills += 1
  result.inside_save += bool(_partial(folder) - partial)
  return True


def _steps(folder: pathlib.Path) -> list[int]:
  return checkpoint.steps_in(folder / 'checkpoints')


def _examples_inode(folder: pathlib.Path) -> int | None:
  """Identifies the file of recorded examples: a resumed run starts a new one."""
  path = folder / _EXAMPLES
  return path.stat().st_ino if path.exists() else None


def _partial(folder: pathlib.Path) -> set[tuple[str, int]]:
  """Returns names and inodes of the unfinished checkpoints."""
  found = set()
  for path in (folder / 'checkpoints').glob(f'*{checkpoint.PARTIAL}'):
    with contextlib.suppress(FileNotFoundError):  # finished in the meantime
      found.add((path.name, path.stat().st_ino))
  return found


def _compare_latest(whole: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Returns the differences of the last complete checkpoint."""
  place = folder / 'checkpoints'
  step = next((step for step in _steps(folder) if not checkpoint.damage(place / str(step))), None)
  return [] if step is None else _compare_arrays(whole, folder, step)[0]


def _compare_arrays(whole: pathlib.Path, folder: pathlib.Path, step: int) -> tuple[list[str], int]:
  """Returns the differences of a checkpoint, and its number of arrays."""
  one, other = (
    {name: array.tobytes() for name, array in checkpoint.load_arrays(place / 'checkpoints', step).items()}
    for place in (folder, whole)
  )
  names = sorted({*one, *other})
  return [f'{name} at step {step}' for name in names if one.get(name) != other.get(name)], len(names)


def _compare(whole: pathlib.Path, folder: pathlib.Path, result: Verification) -> list[str]:
  """Returns the differences of a finished run, and counts what was compared."""
  wrong = []
  expected, steps = _steps(whole), _steps(folder)
  if steps != expected:
    wrong.append(f'checkpoints at steps {steps} instead of {expected}')
  for step in set(steps) & set(expected):
    different, count = _compare_arrays(whole, folder, step)
    wrong += different
    result.compared['arrays'] += count
  keys = ('step', 'split', 'name', 'value', 'images')
  metrics = [
    [tuple(line[key] for key in keys) for line in read_metrics(place) if line['name'] not in _TIMED]
    for place in (whole, folder)
  ]
  if metrics[0] != metrics[1]:
    wrong.append('metrics.jsonl')
  logged = [(line['step'], line['split'], line['name']) for line in read_metrics(folder)]
  if len(logged) != len(set(logged)):
    wrong.append('metrics.jsonl contains a value twice')
  examples = [read_lines(place / _EXAMPLES) for place in (whole, folder)]
  if examples[0] != examples[1]:
    wrong.append("the steps' examples")
  result.compared.update(checkpoints=len(steps), metrics=len(metrics[1]), steps=len(examples[1]))
  return wrong
