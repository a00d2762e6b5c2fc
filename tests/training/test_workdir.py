"""What a run's folder says of the program that made it."""

import subprocess

from alexnet_flax.training import workdir


def test_without_git(monkeypatch, tmp_path):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert workdir.environment()['commit'] is None


def test_the_commit_says_whether_code_was_changed(monkeypatch, tmp_path):
  """Results, which `reproduce` writes while other runs train, and docs are none."""

  def git(*command):
    identity = ('-c', 'user.name=a', '-c', 'user.email=a@b')
    return subprocess.run(
      ['git', *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True
    )

  def commit():
    return workdir.environment()['commit']

  files = [tmp_path / name for name in ('package/training/workdir.py', 'results/a.json', 'docs/a.md')]
  for file in files:
    file.parent.mkdir(parents=True)
    file.touch()
  code, *others = files
  monkeypatch.setattr(workdir, '__file__', str(code))
  assert commit() is None
  git('init', '-q')
  assert commit() is None
  git('add', '.')
  git('commit', '-qm', 'first')
  first = git('rev-parse', '--short=12', 'HEAD').stdout.strip()
  assert commit() == first
  for file in others:
    file.write_text('changed')
  (tmp_path / 'untracked').touch()
  assert commit() == first
  code.write_text('changed')
  assert commit() == first + '+'
