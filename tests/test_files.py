"""Files of a run that are damaged: each is one line that says what to do, and what can be kept is kept."""

import json
import os

import pytest

from alexnet_flax import files
from alexnet_flax.cli.main import main
from alexnet_flax.config import Config
from alexnet_flax.data.images import UnreadableError, read_image
from alexnet_flax.data.source import read_file
from alexnet_flax.errors import UsageError
from alexnet_flax.pretrained import read_names, run_config
from alexnet_flax.training import workdir
from alexnet_flax.training.logger import Logger, read_metrics
from alexnet_flax.weights import open_weights

LINE = {'step': 4, 'epoch': 0.5, 'split': 'train', 'name': 'loss', 'value': 2, 'seconds': 1.5, 'images': 64}
# Valid JSON or not, none of it is what belongs there.
BROKEN = {
  'bytes': b'\xff\xfe{}',
  'NULs': bytes(64),
  'null': b'null',
  'a number': b'17',
  'a list': b'[{"step": 1}]',
  'deep': b'[' * 100_000,
  'cut': b'{"step": 1, "na',
}


@pytest.mark.parametrize('content', BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(tmp_path, content):
  for name in ('config.json', 'environment.json', 'metrics.jsonl'):
    (tmp_path / name).write_bytes(content + b'\n')
  with pytest.raises(UsageError, match=r'config\.json is broken: it holds no JSON object; remove it, or put'):
    run_config(tmp_path)
  assert workdir.read_environment(tmp_path) == {}
  with pytest.raises(UsageError, match=r'line 1 of .*metrics\.jsonl is broken; remove it, and nothing else'):
    read_metrics(tmp_path)


def test_a_folder_in_the_place_of_a_file(tmp_path, capsys):
  for name in ('config.json', 'environment.json', 'metrics.jsonl', '.lock'):
    (tmp_path / name).mkdir()
  with pytest.raises(UsageError, match=r'cannot read .*config\.json: Is a directory'):
    run_config(tmp_path)
  assert workdir.read_environment(tmp_path) == {}
  with pytest.raises(UsageError, match=r'cannot read .*metrics\.jsonl: Is a directory'):
    read_metrics(tmp_path)
  with pytest.raises(UsageError, match=r'\.lock is a folder; remove it'), workdir.sole_writer(tmp_path):
    pass
  with pytest.raises(UsageError, match=r'cannot write .*environment\.json: it is a folder; move it away'):
    workdir.write_records(tmp_path, Config(), (), 0)
  assert 'config.json: Is a directory' in capsys.readouterr().out
  assert (tmp_path / 'damaged' / 'config.json-1').is_dir()
  assert run_config(tmp_path) == Config()


@pytest.mark.parametrize('missing', ['step', 'split', 'name', 'value', 'seconds', 'images'])
def test_a_line_without_a_field_is_broken(tmp_path, missing):
  lines = [LINE, {name: value for name, value in LINE.items() if name != missing}, LINE]
  files.rewrite_lines(tmp_path / 'metrics.jsonl', lines)
  with pytest.raises(UsageError, match=r'line 2 of .*metrics\.jsonl is broken'):
    read_metrics(tmp_path)


def test_the_last_line_counts_without_its_newline_and_is_left_out_aloud_where_it_is_cut(tmp_path):
  path, said = tmp_path / 'metrics.jsonl', []
  path.write_text(json.dumps(LINE) + '\n' + json.dumps(LINE))
  assert read_metrics(tmp_path, said.append) == [LINE, LINE]
  assert said == []
  path.write_text(json.dumps(LINE) + '\n' + json.dumps(LINE)[:-1])
  assert read_metrics(tmp_path, said.append) == [LINE]
  (line,) = said
  assert 'metrics.jsonl was cut short and is left out' in line


@pytest.mark.parametrize(('lines', 'last'), [([], 0), ([LINE], 4)])
def test_lost_metrics_are_noticed(tmp_path, capsys, lines, last):
  files.rewrite_lines(tmp_path / 'metrics.jsonl', lines)
  Logger(tmp_path, first_step=4, total_steps=8, steps_per_epoch=8, is_writer=True).close()
  said = capsys.readouterr().out
  assert (f'metrics.jsonl ends at step {last}, and the run goes on after step 4' in said) == (last < 4)
  assert read_metrics(tmp_path) == lines


def test_what_is_set_aside_is_kept(tmp_path):
  for content in 'ab':
    (tmp_path / 'x').write_text(content)
    aside = files.set_aside(tmp_path / 'x', tmp_path / 'damaged')
    assert aside.read_text() == content
  assert sorted(path.name for path in (tmp_path / 'damaged').iterdir()) == ['x-1', 'x-2']
  (tmp_path / 'file').touch()
  (tmp_path / 'x').touch()
  with pytest.raises(UsageError, match=r'cannot move .*x, which is damaged, to .*file: File exists'):
    files.set_aside(tmp_path / 'x', tmp_path / 'file')


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
  import errno
  import fcntl

  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with workdir.sole_writer(tmp_path):
    assert 'cannot be locked ([Errno 37] No locks available); see that no other' in capsys.readouterr().out


def test_pipes_do_not_hang(tmp_path):
  """Wherever a file of the user's is opened: images, class names, a run's files, weights."""
  pipe = tmp_path / 'image.jpg'
  os.mkfifo(pipe)
  for read in (read_image, read_names, files.read_json, open_weights):
    with pytest.raises((UsageError, UnreadableError), match='not a regular file'):
      read(pipe)
  assert 'not a regular file' in str(read_file(str(pipe)))


@pytest.mark.parametrize(
  'command',
  [
    ['predict', 'a.jpg', '--weights', '~no-such-user/run'],
    ['report', '~no-such-user/run'],
    ['evaluate', '~no-such-user/run'],
    ['convert', '~no-such-user/run', 'a.safetensors'],
    ['doctor', '--workdir', '~no-such-user/run'],
  ],
)
def test_a_home_folder_that_is_not_there(command, capsys):
  assert main(command) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert '~no-such-user/run: there is no such home folder' in line
