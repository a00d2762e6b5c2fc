"""Digests of a folder's files inside of it: Orbax restores a flipped byte without noticing."""

import fnmatch
import hashlib
import json
import os
import pathlib

MANIFEST = 'manifest.json'
_UNLISTED = (MANIFEST, '_CHECKPOINT_METADATA', 'commit_success.txt')  # Orbax writes these last


def damage(checkpoint: pathlib.Path, which: str = '*') -> str | None:
  """What is wrong with a checkpoint's files, or None if they are as they were written.

  Args:
    checkpoint: its folder.
    which: a pattern, to look at some of its files alone.
  """
  try:
    listed = dict(json.loads((checkpoint / MANIFEST).read_text())['files'])
  except (OSError, ValueError, KeyError, TypeError):
    return f'no readable {MANIFEST}'
  for name, digest in listed.items():
    path = checkpoint / name
    if not fnmatch.fnmatchcase(name, which):
      continue
    if not path.is_file():
      return f'{name} is missing'
    try:
      if _digest(path) != digest:
        return f'{name} has changed'
    except OSError as error:
      return f'{name} cannot be read: {error.strerror}'
  return None


def write_manifest(checkpoint: pathlib.Path) -> None:
  """Writes the digest of every file of a checkpoint beside them."""
  files = {
    path.relative_to(checkpoint).as_posix(): _digest(path)
    for path in sorted(checkpoint.rglob('*'))
    if path.is_file() and path.name not in _UNLISTED
  }
  partial = checkpoint / f'{MANIFEST}.partial'
  with partial.open('w') as file:
    json.dump({'files': files}, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(checkpoint / MANIFEST)


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
