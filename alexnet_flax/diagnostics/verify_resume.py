"""`alexnet-flax verify-resume`: a run that is killed again and again, beside one that never was.

Both are the real program in processes of their own. Each kill is SIGKILL: at a random step, inside of a save,
or while the program starts. After each one the last whole checkpoint must have the bits that the other run
had at that step, and at the end so must everything.
"""

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

# What is not said on the command line: enough steps for several checkpoints and evaluations.
_SHORT = {
  'total_steps': 24,
  'optimizer.warmup_steps': 2,
  'checkpoint_every_steps': 4,
  'eval_every_steps': 12,
  'log_every_steps': 4,
}
_EACH = 5  # kills of a run, before it is left to end
_FRUITLESS = 5  # runs that may end unkilled
_TIMED = ('images_per_second',)
_EXAMPLES = 'examples-0.jsonl'
_PROGRAM = 'import sys; from alexnet_flax.cli.train import main; sys.exit(main(sys.argv))'


@dataclasses.dataclass
class Proof:
  """What was done and found.

  Attributes:
    kills: how often the run was killed.
    inside_save: how many of these left an unfinished checkpoint behind.
    equal: after how many of them the run came to the same bits.
    differences: what differed, a line each.
    compared: what was compared at the ends of runs: checkpoints, arrays, values of metrics, steps' examples.
  """

  kills: int = 0
  inside_save: int = 0
  equal: int = 0
  differences: list[str] = dataclasses.field(default_factory=list)
  compared: dict[str, int] = dataclasses.field(default_factory=dict)


def prove_resume(
  flags: Sequence[str], kills: int, *, seed: int = 0, say: Callable[[str], None] = print
) -> Proof:
  """Kills a run `kills` times, and compares it with one that is left alone.

  Args:
    flags: `--config=FILE` and overrides, as for `train.py`; without a number of steps there are few.
    kills: how many; every third waits for a save and strikes inside of it, every sixth in the start.
    seed: of the moments.
    say: is given a line now and then.

  Raises:
    UsageError: the run itself fails.
  """
  given = {flag.lstrip('-').partition('=')[0].removeprefix('config.') for flag in flags}
  refused = sorted(given & {'workdir', 'show_batch', 'coordinator', 'processes', 'process_id'})
  if refused:
    raise UsageError(f'--{refused[0]} is not for this: it runs one process in folders of its own')
  # Given epochs count, and are not replaced by steps.
  short = [
    f'--config.{key}={value}'
    for key, value in _SHORT.items()
    if not given & {key, key.replace('_steps', '_epochs')}
  ]
  kept = ['--config.record_examples=true', '--config.keep_checkpoints=100000', '--config.report=false']
  command = [sys.executable, '-c', _PROGRAM, *flags, *short, *kept]
  moments, proof = random.Random(seed), Proof()
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    whole = root / 'whole'
    seconds = _run_to_the_end(command, whole)
    if len(checkpoint.steps_in(whole / 'checkpoints')) < 2 or not read_metrics(whole):
      raise UsageError('the run is too short to be struck: it needs two checkpoints, and something logged')
    say(f'undisturbed: {len(checkpoint.steps_in(whole / "checkpoints"))} checkpoints in {seconds:.0f} s')
    rounds = 0
    while proof.kills < kills:
      rounds += 1
      folder = root / f'killed-{rounds}'
      before, good = proof.kills, 0
      if rounds > kills + _FRUITLESS:
        raise UsageError(f'{rounds} runs ended before they could be killed; ask for more steps')
      while proof.kills < min(before + _EACH, kills) and _killed(command, folder, whole, moments, proof):
        wrong = _differs_at_latest(whole, folder)
        good += not wrong
        proof.differences += wrong
        say(f'kill {proof.kills} of {kills}: {_state(folder)}{"; DIFFERENT" if wrong else ""}')
      _run_to_the_end(command, folder)
      wrong = _differences(whole, folder, proof)
      proof.differences += wrong
      proof.equal += 0 if wrong else good
      verdict = 'DIFFERENT' if wrong else 'the same bits'
      say(f'run {rounds}, killed {proof.kills - before} times, has ended: {verdict}')
  return proof


def _run_to_the_end(command: list[str], folder: pathlib.Path) -> float:
  start = time.monotonic()
  done = subprocess.run([*command, f'--workdir={folder}'], capture_output=True, text=True, check=False)
  if done.returncode:
    last = (done.stderr.strip() or 'it said nothing').splitlines()[-1]
    raise UsageError(f'the run ends with {done.returncode}: {last.removeprefix("error: ")}')
  return time.monotonic() - start


def _killed(
  command: list[str], folder: pathlib.Path, whole: pathlib.Path, moments: random.Random, proof: Proof
) -> bool:
  """Runs until the next kill; False if the run ends before it."""
  left, log = _partial(folder), _examples(folder)  # by the kill before
  steps = len(read_lines(whole / _EXAMPLES))
  first = next(iter(checkpoint.steps_in(folder / 'checkpoints')), 0) + 1
  last = min(first + steps // _EACH, steps)
  step, seconds = moments.randint(min(first, last), last), moments.uniform(0, 5)
  # A third inside of a save, a sixth in the program's start, the others at a step.
  kind = ('step', 'step', 'save', 'start', 'step', 'save')[proof.kills % 6]
  begun = time.monotonic()

  def is_time() -> bool:
    match kind:
      case 'save':
        return bool(_partial(folder) - left)
      case 'start':
        return time.monotonic() - begun > seconds
      case _:
        return _examples(folder) != log and len(read_lines(folder / _EXAMPLES)) >= step

  with subprocess.Popen(
    [*command, f'--workdir={folder}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    while process.poll() is None and not is_time():
      time.sleep(0.001 if kind == 'save' else 0.01)
    time.sleep(moments.uniform(0, 0.05))
    if process.poll() is not None:
      return False
    process.kill()
  proof.kills += 1
  proof.inside_save += bool(_partial(folder) - left)
  return True


def _examples(folder: pathlib.Path) -> int | None:
  """Which file the examples of the steps are recorded in: a run that goes on begins another."""
  path = folder / _EXAMPLES
  return path.stat().st_ino if path.exists() else None


def _partial(folder: pathlib.Path) -> set[tuple[str, int]]:
  """Unfinished checkpoints: their names, and which of several of a name they are."""
  found = set()
  for path in (folder / 'checkpoints').glob(f'*{checkpoint.PARTIAL}'):
    with contextlib.suppress(FileNotFoundError):  # finished meanwhile
      found.add((path.name, path.stat().st_ino))
  return found


def _state(folder: pathlib.Path) -> str:
  step = next(iter(checkpoint.steps_in(folder / 'checkpoints')), None)
  return 'no checkpoint yet' if step is None else f'the last checkpoint is that of step {step}'


def _differs_at_latest(whole: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """What the last whole checkpoint has otherwise than the undisturbed run had at its step."""
  places = (folder / 'checkpoints', whole / 'checkpoints')
  step = next((s for s in checkpoint.steps_in(places[0]) if not checkpoint.damage(places[0] / str(s))), None)
  return [] if step is None else _different_arrays(*places, step)[0]


def _different_arrays(ours: pathlib.Path, theirs: pathlib.Path, step: int) -> tuple[list[str], int]:
  one, other = (checkpoint.load_arrays(place, step) for place in (ours, theirs))
  names = sorted({*one, *other})
  same = [name in one and name in other and one[name].tobytes() == other[name].tobytes() for name in names]
  return [f'{name} at step {step}' for name, equal in zip(names, same, strict=True) if not equal], len(names)


def _differences(whole: pathlib.Path, folder: pathlib.Path, proof: Proof) -> list[str]:
  """What of an ended run is not as in the undisturbed one."""
  wrong, arrays = [], 0
  steps = [checkpoint.steps_in(place / 'checkpoints') for place in (whole, folder)]
  if steps[0] != steps[1]:
    wrong.append(f'checkpoints of the steps {steps[1]}, not {steps[0]}')
  for step in set(steps[0]) & set(steps[1]):
    different, count = _different_arrays(folder / 'checkpoints', whole / 'checkpoints', step)
    wrong, arrays = wrong + different, arrays + count
  metrics = [
    [
      (line['step'], line['split'], line['name'], line['value'], line['images'])
      for line in read_metrics(place)
      if line['name'] not in _TIMED
    ]
    for place in (whole, folder)
  ]
  if metrics[0] != metrics[1]:
    wrong.append('metrics.jsonl')
  keys = [(line['step'], line['split'], line['name']) for line in read_metrics(folder)]
  if len(keys) != len(set(keys)):
    wrong.append('metrics.jsonl has a value twice')
  examples = [read_lines(place / _EXAMPLES) for place in (whole, folder)]
  if examples[0] != examples[1]:
    wrong.append('the examples of the steps')
  found = {
    'checkpoints': len(steps[1]),
    'arrays': arrays,
    'metrics': len(metrics[1]),
    'steps': len(examples[1]),
  }
  for name, count in found.items():
    proof.compared[name] = proof.compared.get(name, 0) + count
  return wrong
