"""Logs a run: metrics.jsonl, TensorBoard events, a tracker, and a progress bar or plain lines."""

import contextlib
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from alexnet_flax.data.tfrecord import framed
from alexnet_flax.errors import one_line
from alexnet_flax.files import read_lines, rewrite_lines
from alexnet_flax.metrics import Metrics
from alexnet_flax.training.distributed import of_process
from alexnet_flax.training.trackers import Tracking


class Logger:
  """Writes to a run's folder and to the terminal.

  metrics.jsonl has one object a line: step, epoch, split, name, value, seconds (of training and evaluation,
  without start-up and pauses) and images (the number that the value was measured over).
  """

  def __init__(
    self,
    folder: pathlib.Path,
    first_step: int,
    total_steps: int,
    steps_per_epoch: float,
    is_writer: bool,
    label: str = '',
    tracker: str = 'none',
  ):
    """Continues the folder's log after `first_step`; later lines are removed.

    Of several processes one `is_writer`; the others write and print nothing. The lines of one of several runs
    begin with its `label`; there is no progress bar then. A `tracker` gets all of it too.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tqdm import tqdm

    self._is_writer = is_writer
    lines = read_metrics(folder, print if is_writer else None)
    lines = [line for line in lines if line['step'] <= first_step]
    if is_writer:
      if (last := max((line['step'] for line in lines), default=0)) < first_step:
        print(f'note: metrics.jsonl ends at step {last}, and the run goes on after step {first_step}')
      rewrite_lines(folder / 'metrics.jsonl', lines)
      self._metrics = _Appender(folder / 'metrics.jsonl', self.say)
      # Not by a SummaryWriter, whose thread may write an event long after the checkpoint of its step.
      events = folder / f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}'
      self._events = _Appender(events, self.say)
    self._first_step, self._total_steps, self._steps_per_epoch = first_step, total_steps, steps_per_epoch
    self._start = time.monotonic()
    self._seconds_before = max((line['seconds'] for line in lines), default=0.0)
    self._label = f'{label}: ' if label else ''
    disable = bool(label) or not (is_writer and sys.stderr.isatty())
    self._bar = tqdm(total=total_steps, initial=first_step, unit='step', disable=disable)
    if is_writer:
      start = SessionLog(status=SessionLog.START)  # TensorBoard drops the events of later steps before it
      version = Event(wall_time=time.time(), file_version='brain.Event:2')
      purge = Event(wall_time=time.time(), step=first_step + 1, session_log=start)
      self._events.write(framed(version.SerializeToString()) + framed(purge.SerializeToString()))
    self._tracking = None
    if is_writer and tracker != 'none':
      name = '-'.join(
        folder.resolve().parts[-2 if label else -1 :]
      )  # of a seed, with the folder of all seeds
      self._tracking = Tracking(tracker, folder, name, lines, self.say)

  def write(self, step: int, split: str, metrics: Metrics, **others: float) -> dict[str, float]:
    """Logs the means of `metrics` and `others` at a step; returns them all."""
    from tensorboardX.proto.event_pb2 import Event

    values = metrics.means() | others
    if not self._is_writer:
      return values
    seconds = round(self._seconds_before + time.monotonic() - self._start, 3)
    before = {'step': step, 'epoch': round(step / self._steps_per_epoch, 4), 'split': split}
    after = {'seconds': seconds, 'images': int(metrics.images)}
    lines = [before | {'name': name, 'value': value} | after for name, value in values.items()]
    self._metrics.write(b''.join(json.dumps(line, allow_nan=False).encode() + b'\n' for line in lines))
    scalars = [{'tag': f'{split}/{name}', 'simple_value': value} for name, value in values.items()]
    event = Event(wall_time=time.time(), step=step, summary={'value': scalars})
    self._events.write(framed(event.SerializeToString()))
    if self._tracking:
      self._tracking.log(step, split, values)
    return values

  def advance(self, step: int) -> None:
    """Moves the progress bar to a step."""
    self._bar.update(step - self._bar.n)

  def show(self, step: int, split: str, values: dict[str, float]) -> None:
    """Prints a step's values: beside the bar, or as a line where there is no terminal."""
    text = f'{split}: {format_values(values)}'
    if self._bar.disable:
      done = max(step - self._first_step, 1)
      left = (time.monotonic() - self._start) / done * (self._total_steps - step)
      place = f'step {step}/{self._total_steps} epoch {step / self._steps_per_epoch:.2f}'
      self.say(f'{place} {text} [{self._bar.format_interval(left)} left]')
    elif split == 'train':
      self._bar.set_postfix_str(format_values(values))
    else:
      self.say(f'step {step} {text}')

  def say(self, text: str) -> None:
    """Prints a line without breaking the progress bar."""
    if not self._is_writer:
      return
    if self._bar.disable:
      print(one_line(self._label + text), flush=True)
    else:
      self._bar.write(one_line(text))

  def close(self) -> None:
    """Closes the progress bar and the files."""
    if self._tracking:
      self._tracking.close(self._total_steps)
    self._bar.close()
    if self._is_writer:
      self._metrics.close()
      self._events.close()


class _Appender:
  """A file to which bytes are appended at once; what a full disk does not take is kept for the next time."""

  def __init__(self, path: pathlib.Path, say: Callable[[str], None]):
    self._file, self._say, self._pending = path.open('ab', buffering=0), say, b''

  def write(self, content: bytes) -> None:
    self._pending += content
    try:
      while self._pending:
        self._pending = self._pending[self._file.write(self._pending) :]
    except OSError as error:
      why = f'cannot write {self._file.name}: {error.strerror}'
      self._say(f'warning: {why}; its last lines are kept in memory')

  def close(self) -> None:
    self.write(b'')
    self._file.close()


class _SteadyOutput:
  """A stream that goes on in a file when its reader is gone: a closed pipe, a terminal that has hung up."""

  def __init__(self, stream: TextIO, path: pathlib.Path):
    self._stream, self._path = stream, path

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except OSError:
      self._move()
    return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError:
      self._move()

  def _move(self) -> None:
    """Puts the file, or nothing, in the place of the reader, which gets what that did not take."""
    for path in (self._path, pathlib.Path(os.devnull)):
      with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('ab') as file:
          os.dup2(file.fileno(), self._stream.fileno())
        self._stream.flush()
        return

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output(folder: pathlib.Path) -> Iterator[None]:
  """A block that prints on into `folder`/output.log when nobody reads its output any more."""
  path, out, error = folder / of_process('output.log'), contextlib.redirect_stdout, contextlib.redirect_stderr
  with contextlib.ExitStack() as stack:
    for stream, redirect in ((sys.stdout, out), (sys.stderr, error)):
      if stream is None:  # closed from the start
        folder.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(path.open('a', buffering=1, encoding='utf-8'))
      stack.enter_context(redirect(cast(TextIO, _SteadyOutput(stream, path))))
    yield


_FIELDS: dict[str, Any] = {'step': int, 'split': str, 'name': str, 'images': int}
_FIELDS |= dict.fromkeys(('value', 'seconds'), int | float)


def read_metrics(folder: pathlib.Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """Returns the lines of a run's metrics.jsonl; arguments and errors as of `files.read_lines`."""
  return read_lines(folder / 'metrics.jsonl', _FIELDS, say)


def format_values(values: dict[str, float]) -> str:
  """Formats metrics for people: loss 0.123, top1 97.53 %, 1,234 images/s."""
  formats = {'top1': 'top1 {:.2%}', 'top5': 'top5 {:.2%}', 'learning_rate': 'rate {:.3g}'}
  formats |= {'images_per_second': '{:,.0f} images/s'}
  shown = [formats.get(name, f'{name} {{:.4f}}').format(value) for name, value in values.items()]
  return ', '.join(shown).replace('%', ' %')
