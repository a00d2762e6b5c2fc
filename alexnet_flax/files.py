"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


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
