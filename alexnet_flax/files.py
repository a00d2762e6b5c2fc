"""Files that are written whole or not at all, and files of JSON lines."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from alexnet_flax.errors import UsageError


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path beside `path` to write to, which replaces `path` when the block ends without an error.

  Whoever reads `path` sees the old content or the new one. Of a block that fails nothing is left.

  Args:
    path: The file to write. The temporary one has the same ending.
  """
  partial = path.with_name(f'.partial-{os.getpid()}-{path.name}')
  try:
    yield partial
    partial.replace(path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text atomically, and waits until it is on the disk."""
  with atomic_path(path) as partial, partial.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects of a file of JSON lines; a last line that a kill cut short is left out.

  Raises:
    UsageError: Another line is broken.
  """
  if not path.exists():
    return []
  lines = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(keepends=True), start=1):
    if line[-1] == '\n':
      try:
        lines.append(json.loads(line))
      except ValueError:
        raise UsageError(f'line {number} of {path} is broken; remove it, and nothing else is lost') from None
  return lines


def rewrite_lines(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
  """Replaces a file of JSON lines."""
  write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))
