"""Files of a run that are damaged: each is one line that says what to do, and what can be kept is kept."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import pytest

from alexnet_flax import files
from alexnet_flax.cli.main import main
from alexnet_flax.config import Config
from alexnet_flax.data.images import UnreadableError, image_files, read_image
from alexnet_flax.data.source import read_file
from alexnet_flax.errors import UsageError
from alexnet_flax.files import buckets
from alexnet_flax.inference.feature_files import feature_path
from alexnet_flax.pretrained import is_network, read_names, run_config
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


def test_what_a_killed_process_was_writing_is_removed(tmp_path, monkeypatch):
  """Of this machine by its number, of others after a day; not what is being written, nor another file's."""
  with subprocess.Popen(['true']) as ended:
    pass
  path, other = tmp_path / 'a[1].json', tmp_path / 'b.json'

  def left_by(process, host, age=0, of=path):
    monkeypatch.setattr(os, 'getpid', lambda: process)
    monkeypatch.setattr(platform, 'node', lambda: host)
    with pytest.raises(FileNotFoundError), files.atomic_path(of) as partial:
      name = partial
    name.write_text('cut sh')
    os.utime(name, (time.time() - age,) * 2)
    return name

  removed = left_by(ended.pid, 'here'), left_by(ended.pid, 'there', age=2 * 86_400)
  kept = left_by(os.getppid(), 'here'), left_by(ended.pid, 'far'), left_by(ended.pid, 'here', of=other)
  monkeypatch.setattr(platform, 'node', lambda: 'here')
  monkeypatch.setattr(os, 'getpid', lambda: 1)
  files.write_text(path, 'whole')
  assert path.read_text() == 'whole'
  assert not any(name.exists() for name in removed)
  assert all(name.exists() for name in kept)


def test_links_are_followed_and_devices_written_to(tmp_path):
  (tmp_path / 'there').mkdir()
  (tmp_path / 'link').symlink_to('there/file')  # which is not there yet
  for text in ('one', 'two'):
    files.write_text(tmp_path / 'link', text)
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'there' / 'file').read_text() == text
  (tmp_path / 'null').symlink_to('/dev/null')
  files.write_text(tmp_path / 'null', 'gone')
  assert (tmp_path / 'null').is_char_device()
  os.mkfifo(tmp_path / 'pipe')
  reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
  with files.atomic_path(tmp_path / 'pipe') as place, place.open('w') as file:
    file.write('through')
  assert os.read(reader, 99) == b'through'
  os.close(reader)
  assert (tmp_path / 'pipe').is_fifo()
  with pytest.raises(UsageError, match='it is a pipe that nobody reads'):  # and not for ever
    files.write_text(tmp_path / 'pipe', 'in vain')


@pytest.mark.parametrize('name', ['n' * 255, f'{"n" * 5}.{"e" * 249}', 'ü' * 127, '.h5'])
def test_every_name_that_a_file_system_takes_can_be_written(tmp_path, name):
  files.write_text(tmp_path / name, 'whole')
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_belong_together_leave_nothing_of_a_failure(tmp_path):
  with pytest.raises(FileExistsError), files.partial_folder(tmp_path / 'a') as folder:
    folder.mkdir()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('place', ['', 'absent/a', '/proc/version/a'])
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, place):
  with pytest.raises(UsageError, match='cannot write'):
    files.check_writable(tmp_path / place)
  for path in (tmp_path / 'a', pathlib.Path('/dev/null')):
    files.check_writable(path)


def test_links_that_lead_nowhere_are_said_before_the_work(tmp_path):
  for name, target in (('loop', 'loop'), ('dangling', 'absent/a'), ('long', 'n' * 256)):
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UsageError, match=f'cannot write .*{name}: '):
      files.check_writable(tmp_path / name)
  (tmp_path / 'link').symlink_to('file')  # which is not there yet
  files.check_writable(tmp_path / 'link')


def test_a_pipe_gets_the_content_of_what_is_moved_there(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
  (tmp_path / 'whole').write_text('through')
  files.move_into_place(tmp_path / 'whole', tmp_path / 'pipe')
  assert os.read(reader, 99) == b'through'
  os.close(reader)
  assert (tmp_path / 'pipe').is_fifo()
  files.move_into_place(tmp_path / 'whole', tmp_path / 'file')
  assert (tmp_path / 'file').read_text() == 'through'
  assert not (tmp_path / 'whole').exists()


LONG = 'x' * 300


@pytest.mark.parametrize(
  ('command', 'message'),
  [
    (['predict', 'a.jpg', '--weights', LONG], 'no file and no published weights'),
    (['predict', 'a.jpg', '--weights', f'{LONG}.pth'], '.pth: File name too long'),
    (['report', LONG], 'config.json: File name too long'),
    (['evaluate', LONG], 'there is no such network'),
    (
      ['features', 'a.jpg', '--layers', 'fc7', '--out', f'{LONG}.h5', '--weights', 'a.pth'],
      '.h5: File name too',
    ),
    (['convert', 'a.pth', f'{LONG}.safetensors'], '.safetensors: File name too long'),
    (['evaluate', 'a.pth', '--json', LONG], 'File name too long'),
    (['predict', 'a.jpg', '--weights', f'http://[bad/a.pth?{LONG}'], 'cannot download http://[bad/a.pth: '),
  ],
)
def test_too_long_a_name_is_one_line(command, message, capsys):
  assert main(command) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


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


@pytest.mark.parametrize(
  'command',
  [
    ['predict', 'a.jpg', '--weights', ''],
    ['predict', '', '--weights', 'torchvision'],
    ['report', ''],
    ['evaluate', 'a.pth', '--json', ''],
    ['convert', '', 'a.safetensors'],
    ['doctor', '--workdir', ''],
  ],
)
def test_an_empty_name_is_no_default(command, capsys):
  """It comes of a variable that is not set: --weights "$RUN"."""
  assert main(command) == 2
  assert capsys.readouterr().err == 'error: the name of a file or a folder is empty\n'


@pytest.mark.parametrize(
  'command',
  [
    ['predict', 'a.jpg', '--weights', 'az://b/x.pth'],
    ['predict', 'az://b/a.jpg', '--weights', 'torchvision'],
    ['report', 'hdfs://b/run'],
    ['evaluate', 'az://b/run', '--dataset', 'digits:test'],
    ['convert', 'az://b/x.pth', 'a.safetensors'],
    ['convert', 'torchvision', 'az://b/a.safetensors'],
    ['doctor', '--workdir', 'az://b/run'],
    ['prepare', 'digits', '--data_dir', 'az://b/data'],
    ['compare', 'az://b/a.h5', 'az://b/b.h5'],
  ],
)
def test_an_unknown_scheme_is_one_line_and_no_folder(command, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(command) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(
    r'(az|hdfs)://\S+: \1:// cannot be read or written; give a path, or one of gs://, s3://', line
  )
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(('scheme', 'module'), [('gs', 'gcsfs'), ('s3', 's3fs')])
def test_a_bucket_without_its_extra_is_one_line(scheme, module, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, module, None)
  buckets._filesystem.cache_clear()
  assert main(['report', f'{scheme}://b/run']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert f'{scheme}:// needs {module}, which is not installed: pip install' in line
  assert line.endswith("[buckets]'")


def test_every_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
  """The shell replaces ~ in `--out ~/a` and leaves `--out=~/a` as it is."""
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'photos').mkdir()
  (tmp_path / 'photos' / 'a.png').touch()
  assert image_files(['~/photos', '~/photos/*.png']) == [str(tmp_path / 'photos' / 'a.png')] * 2
  assert feature_path('~/a.h5') == tmp_path / 'a.h5'
  assert not is_network('~/photos/a.png')
  monkeypatch.chdir(tmp_path)
  pathlib.Path('~$a.png').touch()  # as the shell hands it on for *.png
  assert image_files(['~$a.png']) == ['~$a.png']


@pytest.mark.parametrize(
  ('place', 'shown'),
  [
    ('http://[bad/x', 'http://[bad/x'),
    ('https://ada:b@c@host/x?y#z', 'https://host/x'),
    ('file:///home/ada/x.pth', '.../x.pth'),
    ('gs://bucket/a/b', 'gs://bucket/a/b'),
    ('../a/b', '.../b'),
  ],
)
def test_what_others_see_of_a_path(place, shown):
  assert files.public(place) == shown
