"""The compilation cache of commands: kept, mended where it is damaged, and never in the way."""

import os
import subprocess
import sys
import warnings

import pytest

from alexnet_flax.cli import compilation_cache

PROGRAM = """
from alexnet_flax.cli.compilation_cache import use_compilation_cache
use_compilation_cache()
import jax
print(jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((5, 5)))[0, 0])
"""


def run(cache):
  own = {'ALEXNET_FLAX_CACHE': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  others = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=others | own, capture_output=True, text=True, check=True
  )
  assert done.stderr == ''
  return done.stdout


def entries(cache):
  return {path.name: path.read_bytes() for path in cache.rglob('*-cache')}


def test_damaged_entries_are_compiled_anew(tmp_path):
  printed = run(tmp_path)
  whole = entries(tmp_path)
  (step,) = [name for name in whole if name.startswith('jit__lambda')]
  for damage in (lambda content: content[: len(content) // 2], lambda content: content[:-9] + bytes(9)):
    (path,) = tmp_path.rglob(step)
    path.write_bytes(damage(whole[step]))
    assert run(tmp_path) == printed
    assert entries(tmp_path).keys() == whole.keys()
    assert len(entries(tmp_path)[step]) == pytest.approx(len(whole[step]), rel=0.01)


def test_where_nothing_can_be_written_nothing_is_kept():
  assert run('/proc/version/cache') == '4.2073545\n'


def test_what_is_not_ours_is_left_alone(tmp_path, monkeypatch):
  """Neither another program's entries, where the user names the folder, nor what cannot be removed."""
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '5')
  monkeypatch.setattr(warnings, 'showwarning', None)
  monkeypatch.setattr(compilation_cache, '_MAX_BYTES', 0)
  (tmp_path / 'other-1-cache').write_bytes(bytes(10))
  (tmp_path / 'jit_f-1-cache').mkdir()
  compilation_cache.use_compilation_cache()
  message = "Error reading persistent compilation cache entry for 'jit_f': IsADirectoryError"
  warnings.showwarning(message, UserWarning, 'compiler.py', 1)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['jit_f-1-cache', 'other-1-cache']


def test_a_folder_that_jax_cannot_name(monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setenv('ALEXNET_FLAX_CACHE', os.fsdecode(b'/caf\xe9'))
  compilation_cache.use_compilation_cache()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


def test_the_oldest_entries_are_removed(tmp_path, monkeypatch):
  monkeypatch.setattr(compilation_cache, '_MAX_BYTES', 20)
  for age, name in enumerate('cab'):
    (tmp_path / f'{name}-cache').write_bytes(bytes(10))
    os.utime(tmp_path / f'{name}-cache', (age, age))
  compilation_cache._prune(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a-cache', 'b-cache']
