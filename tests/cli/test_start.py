"""Commands in the environments that people have: any encoding of output, a user without a home folder."""

import io
import os
import pwd
import subprocess
import sys
import types

import jax
import pytest

from alexnet_flax.cli import start
from alexnet_flax.cli.main import VERBS, main
from alexnet_flax.errors import UsageError
from alexnet_flax.training.experiment import compile_train_step


@pytest.mark.parametrize(
  ('encoding', 'printed'),
  [('ascii', b'K\\xe4se \\u65e5 \\udcff\n'), ('latin-1', b'K\xe4se \\u65e5 \\udcff\n')],
)
def test_output_of_any_encoding_takes_any_name(monkeypatch, encoding, printed):
  out = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(out, encoding=encoding))
  start.set_up()
  print('Käse 日', os.fsdecode(b'\xff'), flush=True)
  assert out.getvalue() == printed


def test_a_user_without_passwd_entry_and_home_has_a_temporary_one(monkeypatch, tmp_path, capsys):
  def no_entry(number):
    raise KeyError(number)

  monkeypatch.setattr(pwd, 'getpwuid', no_entry)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  monkeypatch.setenv('HOME', '')
  monkeypatch.delenv('HOME')
  start.set_up()
  assert os.path.expanduser('~') == str(tmp_path / f'alexnet_flax-{os.getuid()}')
  assert os.path.isdir(os.path.expanduser('~'))
  assert 'note: this user has no home folder' in capsys.readouterr().err
  monkeypatch.delenv('HOME')
  monkeypatch.setattr(os, 'getuid', lambda: 12345)
  (tmp_path / 'alexnet_flax-12345').mkdir()
  with pytest.raises(UsageError, match=r'this user has no home folder, and .* is of another; set HOME'):
    start.set_up()
  assert main(['predict', 'a.png']) == 2


def test_a_run_without_compilation():
  """With JAX_DISABLE_JIT=1, to look into a step; JAX compiles nothing ahead of time then."""
  steps = types.SimpleNamespace(train=jax.jit(lambda x: x + 1))
  with jax.disable_jit():
    assert compile_train_step(types.SimpleNamespace(steps=steps), None)(1) == 2


def test_help_imports_nothing_heavy():
  """Of the program and of every verb: it is there in a moment."""
  program = (
    'import contextlib, sys\n'
    'from alexnet_flax.cli.main import VERBS, main\n'
    'for words in ([], *([verb] for verb in VERBS)):\n'
    '  with contextlib.suppress(SystemExit):\n'
    "    main([*words, '--help'])\n"
    "print({'jax', 'numpy', 'tensorflow', 'PIL'} & sys.modules.keys())\n"
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout.count('usage: ') == 1 + len(VERBS)
  assert done.stdout.endswith('\nset()\n')
