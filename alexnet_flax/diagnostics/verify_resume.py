"""`alexnet-flax verify-resume`: kills a run repeatedly and compares it with an uninterrupted run.

Both are the real program in separate processes. A kill is SIGKILL: at a random step, during a save or an
upload, or during start-up, and always after a checkpoint: only then does it prove anything. After each kill
the last complete checkpoint must be bit-identical to that of the uninterrupted run at the same step; at the
end, so must everything else.
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
from alexnet_flax.files import expanded
from alexnet_flax.files.buckets import fetched, is_bucket, listing
from alexnet_flax.training.batches import read_examples
from alexnet_flax.training.bucket_run import place_here
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
  """The results."""

  kills: int = 0  # after which a checkpoint was restored
  inside_save: int = 0  # kills of those that left an unfinished checkpoint behind
  inside_upload: int = 0  # kills of those that left a part of a checkpoint in a bucket
  equal: int = 0  # kills of those after which the run was bit-identical
  differences: list[str] = dataclasses.field(default_factory=list)
  compared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by kind


def verify_resume(
  flags: Sequence[str],
  kills: int,
  *,
  seed: int = 0,
  say: Callable[[str], None] = print,
  bucket: str | None = None,
) -> Verification:
  """Kills a run `kills` times, and compares it with an uninterrupted one.

  Args:
    flags: `--config=FILE` and overrides, as for `train.py`. The default is a small number of steps.
    kills: The number of kills, of which those of a run are spread over its length, each at a random step. A
      third of them waits for a save from there on (in a bucket a sixth, and a sixth for an upload), a sixth
      strikes during start-up. One that leaves no checkpoint to resume from, or strikes after the last one, is
      not counted.
    seed: The seed of the random times.
    say: Receives lines about the progress.
    bucket: The URL below which the killed runs lie; they lie in temporary folders if None.

  Raises:
    UsageError: The run itself fails, or is too short to be killed between two checkpoints.
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
    whole = pathlib.Path(temporary, 'whole')
    start = time.monotonic()
    _run(command, whole)
    saved = _steps(whole)
    if len(saved) < 2 or not read_metrics(whole):
      raise UsageError('the run is too short to be interrupted: it needs two checkpoints and logged metrics')
    seconds = time.monotonic() - start
    say(f'uninterrupted: {len(saved)} checkpoints in {seconds:.0f} s')
    to_start = max(seconds - read_metrics(whole)[-1]['seconds'], 0)
    kinds = ('step', 'save' if bucket is None else 'upload', 'step', 'start', 'step', 'save')
    rounds = 0
    while result.kills < kills:
      rounds += 1
      if rounds > kills + _MISSES:
        counted = f'only {result.kills} kills came between two checkpoints, in {rounds - 1} runs'
        raise UsageError(f'{counted}; train for more steps')
      workdir: str | pathlib.Path = pathlib.Path(temporary, f'killed-{rounds}')
      if bucket is not None:
        workdir = f'{bucket}/killed-{rounds}'
      before, wrong, restored = result.kills, list[str](), 0
      count = min(_KILLS_PER_RUN, kills - before)
      while (part := result.kills - before) < count:
        kind, start = kinds[result.kills % len(kinds)], time.monotonic()
        step = round((part + rng.random()) / count * saved[1])
        killed = _kill(command, workdir, kind, step, rng.uniform(0, to_start))
        folder = fetched(expanded(workdir))
        latest = _latest_whole(folder)
        restored = latest if latest < saved[0] else 0
        if killed is None or not restored:
          break
        made, inside = killed
        result.kills += 1
        result.inside_save += 'save' in inside
        result.inside_upload += 'upload' in inside
        different, _ = _compare_arrays(whole, folder, latest)
        wrong += different
        verdict = '; DIFFERENT' if different else ''
        where = ' and '.join([f'at step {made}', *(f'inside the {one}' for one in inside)])
        what = f'{where}, after {time.monotonic() - start:.0f} s'
        say(f'kill {result.kills} of {kills} {what}: last checkpoint at step {latest}{verdict}')
      said = _run(command, workdir)
      folder = fetched(expanded(workdir))
      if restored and f'steps {restored + 1} to' not in said:
        wrong.append(f'the checkpoint of step {restored} was not restored')
      wrong += _compare(whole, folder, result)
      result.differences += wrong
      result.equal += 0 if wrong else result.kills - before
      verdict = 'DIFFERENT' if wrong else 'bit-identical'
      say(f'run {rounds} finished after {result.kills - before} kills: {verdict}')
  return result


def _run(command: list[str], folder: str | pathlib.Path) -> str:
  """Runs the program to its end; returns what it printed."""
  done = subprocess.run([*command, f'--workdir={folder}'], capture_output=True, text=True, check=False)
  if done.returncode:
    last = (done.stderr.strip() or 'no message').splitlines()[-1]
    raise UsageError(f'the run fails with exit code {done.returncode}: {last.removeprefix("error: ")}')
  return done.stdout


def _kill(
  command: list[str], workdir: str | pathlib.Path, kind: str, step: int, seconds: float
) -> tuple[int, list[str]] | None:
  """Runs the program and kills it once there is a checkpoint; returns None if it ends before.

  It is killed as soon as `step` steps are made, of the kind 'save' or 'upload' within the next of these; of
  the kind 'start' after so many `seconds`. Returns the steps that were made, and which it left unfinished.
  """
  begin, log = time.monotonic(), _examples_inode(place_here(workdir))  # all as the previous kill left them
  before = {one: _unfinished(one, workdir) for one in ('save', 'upload')}
  is_resumable = False

  def made() -> int:
    folder = place_here(workdir)
    return 0 if _examples_inode(folder) in (log, None) else len(read_examples(folder / _EXAMPLES))

  def is_time() -> bool:
    nonlocal is_resumable
    if not is_resumable and is_bucket(workdir):
      is_resumable = any(name.endswith(f'/{checkpoint.MANIFEST}') for name in listing(str(workdir)))
    elif not is_resumable:
      is_resumable = bool(_steps(place_here(workdir)))
    if kind == 'start':
      return is_resumable and time.monotonic() - begin > seconds
    is_inside = kind == 'step' or bool(_unfinished(kind, workdir) - before[kind])
    return is_resumable and is_inside and made() >= step

  with subprocess.Popen(
    [*command, f'--workdir={workdir}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    while process.poll() is None and not is_time():
      time.sleep(0.001 if kind == 'save' else 0.05)  # a server, which may be in this process, has work to do
    if process.poll() is not None:
      return None
    process.kill()
  return made(), [one for one, left in before.items() if _unfinished(one, workdir) - left]


def _unfinished(kind: str, workdir: str | pathlib.Path) -> set[tuple[str, float]]:
  """Returns what identifies unfinished checkpoints: on the disk, or for the kind 'upload' in the bucket."""
  if kind == 'save':
    return _partial(place_here(workdir))
  there = listing(f'{workdir}/checkpoints') if is_bucket(workdir) else {}
  whole = {name.partition('/')[0] for name in there if name.endswith(f'/{checkpoint.MANIFEST}')}
  return {(name, one.time) for name, one in there.items() if name.partition('/')[0] not in whole}


def _steps(folder: pathlib.Path) -> list[int]:
  return checkpoint.steps_in(folder / 'checkpoints')


def _examples_inode(folder: pathlib.Path) -> int | None:
  """Identifies the file of recorded examples: a resumed run starts a new one."""
  path = folder / _EXAMPLES
  return path.stat().st_ino if path.exists() else None


def _partial(folder: pathlib.Path) -> set[tuple[str, float]]:
  """Returns names and inodes of the unfinished checkpoints."""
  found = set[tuple[str, float]]()
  for path in (folder / 'checkpoints').glob(f'*{checkpoint.PARTIAL}'):
    with contextlib.suppress(FileNotFoundError):  # finished in the meantime
      found.add((path.name, path.stat().st_ino))
  return found


def _latest_whole(folder: pathlib.Path) -> int:
  """Returns the step of the last complete checkpoint; 0 if there is none."""
  place = folder / 'checkpoints'
  return next((step for step in _steps(folder) if not checkpoint.damage(place / str(step))), 0)


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
  if len({line[:3] for line in metrics[1]}) < len(metrics[1]):
    wrong.append('metrics.jsonl contains a value twice')
  examples = [read_examples(place / _EXAMPLES) for place in (whole, folder)]
  if examples[0] != examples[1]:
    wrong.append("the steps' examples")
  result.compared.update(checkpoints=len(steps), metrics=len(metrics[1]), steps=len(examples[1]))
  return wrong
