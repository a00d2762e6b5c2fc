"""Logs a run: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from alexnet_flax.errors import one_line
from alexnet_flax.files import read_lines, rewrite_lines
from alexnet_flax.metrics import Metrics


class Logger:
  """Writes to a run's folder and to the terminal.

  metrics.jsonl has one object a line: step, epoch, split, name, value, seconds (of training and evaluation,
  without start-up and pauses) and images (the number that the value was measured over).
  """

  def __init__(
    self, folder: pathlib.Path, first_step: int, total_steps: int, steps_per_epoch: float, is_writer: bool
  ):
    """Continues the folder's log after `first_step`; later lines are removed.

    Of several processes one `is_writer`; the others write and print nothing.
    """
    import tensorboardX
    from tqdm import tqdm

    self._is_writer, self._pending = is_writer, b''
    lines = read_metrics(folder, print if is_writer else None)
    lines = [line for line in lines if line['step'] <= first_step]
    if is_writer:
      if (last := max((line['step'] for line in lines), default=0)) < first_step:
        print(f'note: metrics.jsonl ends at step {last}, and the run goes on after step {first_step}')
      rewrite_lines(folder / 'metrics.jsonl', lines)
      # Without a bound: its thread ends when the disk is full, and a bounded queue would block us then.
      self._events = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1, max_queue=0)
      self._file = (folder / 'metrics.jsonl').open('ab', buffering=0)
    self._first_step, self._total_steps, self._steps_per_epoch = first_step, total_steps, steps_per_epoch
    self._start = time.monotonic()
    self._seconds_before = max((line['seconds'] for line in lines), default=0.0)
    disable = not (is_writer and sys.stderr.isatty())
    self._bar = tqdm(total=total_steps, initial=first_step, unit='step', disable=disable)

  def write(self, step: int, split: str, metrics: Metrics, **others: float) -> dict[str, float]:
    """Logs the means of `metrics` and `others` at a step; returns them all."""
    values = metrics.means() | others
    if not self._is_writer:
      return values
    seconds = round(self._seconds_before + time.monotonic() - self._start, 3)
    before = {'step': step, 'epoch': round(step / self._steps_per_epoch, 4), 'split': split}
    after = {'seconds': seconds, 'images': int(metrics.images)}
    for name, value in values.items():
      line = before | {'name': name, 'value': value} | after
      self._pending += json.dumps(line, allow_nan=False).encode() + b'\n'
      self._events.add_scalar(f'{split}/{name}', value, step)
    self._flush()
    return values

  def _flush(self) -> None:
    """Writes pending lines; those that a full disk does not take are kept for the next time."""
    try:
      while self._pending:
        self._pending = self._pending[self._file.write(self._pending) :]
    except OSError as error:
      why = f'cannot write {self._file.name}: {error.strerror}'
      self.say(f'warning: {why}; its last lines are kept in memory')

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
      print(one_line(text), flush=True)
    else:
      self._bar.write(one_line(text))

  def close(self) -> None:
    """Closes the progress bar and the files."""
    self._bar.close()
    if self._is_writer:
      self._flush()
      self._events.close()
      self._file.close()


_FIELDS = {
  'step': int,
  'split': str,
  'name': str,
  'value': int | float,
  'seconds': int | float,
  'images': int,
}


def read_metrics(folder: pathlib.Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
  """Returns the lines of a run's metrics.jsonl; arguments and errors as of `files.read_lines`."""
  return read_lines(folder / 'metrics.jsonl', _FIELDS, say)


def format_values(values: dict[str, float]) -> str:
  """Formats metrics for people: loss 0.123, top1 97.53 %, 1,234 images/s."""
  formats = {'top1': 'top1 {:.2%}', 'top5': 'top5 {:.2%}', 'learning_rate': 'rate {:.3g}'}
  formats['images_per_second'] = '{:,.0f} images/s'
  shown = [formats.get(name, f'{name} {{:.4f}}').format(value) for name, value in values.items()]
  return ', '.join(shown).replace('%', ' %')
