"""JAX's persistent compilation cache, in the user's cache folder: a second start compiles nothing anew."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
from typing import Any

from alexnet_flax.files.cache import cache_folder

_MAX_BYTES = 2 * 2**30  # beyond which the oldest entries are removed
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(\S+)'")
_UNWRITABLE = 'Error writing persistent compilation cache entry'


def use_compilation_cache() -> None:
  """Lets JAX keep what it compiles, here and in child processes.

  JAX's own environment variables come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and
  `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. An entry that a kill or the disk has damaged is removed
  and compiled anew; where nothing can be written, nothing is kept.
  """
  # Compiled for this processor: others may lack an instruction, and share the folder.
  own = cache_folder() / 'compiled' / hashlib.sha256(_processor().encode()).hexdigest()[:8]
  if re.search('[\ud800-\udfff]', str(own)):  # a name that is not UTF-8, at which JAX would raise
    return
  for name, value in {
    'jax_compilation_cache_dir': str(own),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }.items():
    if os.environ.setdefault(name.upper(), str(value)) == str(value) and 'jax' in sys.modules:
      sys.modules['jax'].config.update(name, value)
  folder = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
  if folder == own:  # another may hold what other programs have compiled
    _prune(folder)
  before = warnings.showwarning

  def show(message: Warning | str, *rest: Any, **options: Any) -> None:
    if found := _UNREADABLE.match(str(message)):
      for entry in folder.glob(f'{found[1]}-*-cache'):
        with contextlib.suppress(OSError):  # of another user, or a folder
          entry.unlink()  # or JAX would not write it again
    elif not str(message).startswith(_UNWRITABLE):
      before(message, *rest, **options)

  warnings.showwarning = show


def _processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    return '\n'.join(sorted({line for line in lines if re.match('flags|Features|model name', line)}))
  except OSError:  # not Linux
    return f'{platform.machine()} {platform.processor()}'


def _prune(folder: pathlib.Path) -> None:
  try:
    entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in folder.glob('*-cache'))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in entries:
      if total <= _MAX_BYTES:
        break
      entry.unlink(missing_ok=True)
      total -= size
  except OSError:  # not there yet, or another process prunes it
    pass
