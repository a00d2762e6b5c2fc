"""Folders of images: layouts, classes, what is left out and said, and names and links as people have them."""

import errno
import os
import pathlib

import numpy as np
import pytest

from alexnet_flax.data import folder_source, source
from alexnet_flax.data.images import UnreadableError, image_files
from alexnet_flax.data.source import read_labels, require_same_classes
from alexnet_flax.data.tfds_source import open_dataset, split_names
from alexnet_flax.errors import UsageError
from tests.helpers import encode, smooth_image

IMAGE = encode(smooth_image(20, 30, 0))


def write(root: pathlib.Path, *files: str) -> str:
  """Writes one image under each name; returns the folder."""
  for name in files:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(IMAGE)
  return str(root)


def write_splits(root, classes=('cat', 'dog'), count=4):
  names = [f'{i}.{("jpg", "png", "JPEG")[i % 3]}' for i in range(count)]
  return write(
    root, *(f'{split}/{one}/{name}' for split in ('train', 'val') for one in classes for name in names)
  )


def names_of(split, root):
  found = open_dataset('image_folder', split, root)
  return [os.path.relpath(example.name, root) for example in found.scan_all()]


def test_image_folders(tmp_path):
  for split in ('train', 'validation'):
    for label, number in (('cat', 0), ('dog', 10)):
      write(tmp_path, *(f'{split}/{label}/{i}.jpg' for i in range(4)))
      for i in range(4):
        (tmp_path / split / label / f'{i}.jpg').write_bytes(encode(smooth_image(30, 40, number + i)))
  found = open_dataset('image_folder', 'train', str(tmp_path))
  assert found.class_names == ('cat', 'dog')
  paths = sorted((tmp_path / 'train').rglob('*.*'))
  expected = [(path.read_bytes(), found.class_names.index(path.parent.name)) for path in paths]
  contents = lambda one: [(example.image, example.label) for example in one.read(np.arange(one.num_examples))]  # noqa: E731
  ours = contents(found)
  assert sorted(ours) == sorted(expected)
  assert ours != expected  # the classes are mixed, so that a slice contains all of them
  part = open_dataset('image_folder', 'train[6:]+validation[:1]', str(tmp_path))
  assert contents(part)[:-1] == ours[6:]
  assert contents(part)[-1] == contents(open_dataset('image_folder', 'validation', str(tmp_path)))[0]


def test_the_order_is_that_of_tfds(tmp_path):
  import tensorflow_datasets as tfds

  root = write_splits(tmp_path)
  theirs = tfds.folder_dataset.ImageFolder(root)._split_examples['train']
  assert names_of('train', root) == [os.path.relpath(example.image_path, root) for example in theirs]


@pytest.mark.parametrize(
  ('split', 'files', 'message'),
  [
    ('train', [], 'no images in'),
    ('train', ['cat.jpg'], 'no images in .*; it must contain SPLIT/CLASS/image or CLASS/image'),
    ('train', ['train/cat/1.jpg', 'train/cat/2.jpg'], r"has one class \('cat'\)"),
    ('test', ['train/cat/1.jpg', 'train/dog/1.jpg', 'test/.x/1.jpg'], 'unknown split.*folder test holds no'),
    ('test', ['cat/1.jpg', 'cat/2.jpg', 'cat/3.jpg', 'dog/1.jpg'], "unknown split 'test'.*choices: train"),
    ('all[:1]', ['train/cat/1.jpg', 'train/dog/1.jpg'], 'unknown split'),
    ('train[:0]', ['train/cat/1.jpg', 'train/dog/1.jpg'], 'has no images'),
  ],
)
def test_folders_that_cannot_be_opened(tmp_path, split, files, message):
  with pytest.raises(UsageError, match=message):
    open_dataset('image_folder', split, write(tmp_path, *files))


def test_no_folder(tmp_path):
  for place in (None, str(tmp_path / 'nowhere')):
    with pytest.raises(UsageError, match='must be a folder of SPLIT/CLASS/image or CLASS/image'):
      open_dataset('image_folder', 'train', place)


def test_folders_without_images_and_hidden_ones_are_no_classes(tmp_path, capsys):
  root = write_splits(tmp_path)
  write(
    tmp_path, 'train/.ipynb_checkpoints/a.jpg', '.git/x/y.png', '__MACOSX/cat/._0.jpg', 'train/cat/._0.jpg'
  )
  write(tmp_path, 'runs/mine/map.png', 'train/cat/best/7.jpg', 'train/dog/notes.txt')
  (tmp_path / 'train' / 'empty').mkdir()
  found = open_dataset('image_folder', 'train', root)
  assert found.class_names == ('cat', 'dog')
  assert found.num_examples == 8
  said = capsys.readouterr()
  assert '3 files below' in said.err  # ._0.jpg, best/7.jpg, notes.txt
  assert 'are not used (the first: train/cat/._0.jpg)' in said.err
  assert not said.out  # --json - has the standard output to itself
  assert image_files([str(tmp_path / 'train' / 'cat')]) == [
    str(tmp_path / 'train' / 'cat' / name) for name in ('0.jpg', '1.png', '2.JPEG', '3.jpg', 'best/7.jpg')
  ]


def test_classes_are_those_of_the_splits_that_belong_together(tmp_path, capsys):
  root = write(tmp_path, *(f'train/{one}/{i}.jpg' for one in ('a', 'b') for i in range(3)))
  write(
    tmp_path, 'val/a/1.jpg', 'val/a/2.jpg', 'val/c/1.jpg', 'test/c/1.jpg', 'test/c/2.jpg', 'scraps/x/1.jpg'
  )
  for split in ('train', 'val', 'test', 'train[:2]+test'):
    assert open_dataset('image_folder', split, root).class_names == ('a', 'b', 'c')
  said = capsys.readouterr().err
  assert f'{root}:val has classes with one image or none: b (0), c (1)' in said
  assert np.bincount(read_labels(open_dataset('image_folder', 'val', root))).tolist() == [2, 0, 1]


def test_splits_with_different_classes(tmp_path):
  root = write(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg', 'test/c/1.jpg', 'test/d/1.jpg')
  train, test = (open_dataset('image_folder', split, root) for split in ('train', 'test'))
  require_same_classes(train, train)
  with pytest.raises(UsageError, match=r"different classes: only .*train has 'a', 'b'; only .*test has 'c'"):
    require_same_classes(train, test)


@pytest.mark.parametrize(('one', 'other'), [('Bees', 'bees'), ('K\u00e4fer', 'Ka\u0308fer')])
def test_classes_that_differ_in_case_alone(tmp_path, one, other):
  root = write(tmp_path, f'train/{one}/1.jpg', 'train/ants/1.jpg', f'val/{other}/1.jpg', f'val/{other}/2.jpg')
  if len(os.listdir(tmp_path / 'val')) != 1 or os.listdir(tmp_path / 'train') == os.listdir(tmp_path / 'val'):
    pytest.skip('this file system does not tell them apart')
  for split in ('train', 'val'):
    with pytest.raises(
      UsageError, match=r"'.*' \([12] images\) and '.*' \([12] images\) differ in case or encoding"
    ):
      open_dataset('image_folder', split, root)


def test_a_folder_without_splits_is_divided_by_a_fixed_rule(tmp_path, capsys):
  root = write(tmp_path, *(f'{one}/{i:02}.jpg' for one, n in (('cat', 10), ('dog', 14)) for i in range(n)))
  write(tmp_path, 'cat/best/1.jpg')
  assert split_names('image_folder', root) == ['train', 'validation']
  held_out = names_of('validation', root)
  assert sorted(held_out) == ['cat/04.jpg', 'cat/09.jpg', 'dog/04.jpg', 'dog/09.jpg']
  assert set(held_out) | set(names_of('train', root)) == {f'cat/{i:02}.jpg' for i in range(10)} | {
    f'dog/{i:02}.jpg' for i in range(14)
  }
  assert np.bincount(read_labels(open_dataset('image_folder', 'train', root))).tolist() == [8, 12]
  said = capsys.readouterr().err
  assert "4 images; of each class, every fifth image by name is in 'validation'" in said
  assert said.count('1 files below') == 1  # said once, though two splits were opened


def test_links_to_folders_are_followed_in_training_and_prediction(tmp_path):
  write(tmp_path / 'elsewhere', *(f'{i}.jpg' for i in range(3)))
  root = write(tmp_path / 'data', 'train/dog/1.jpg', 'train/dog/2.jpg')
  (tmp_path / 'data' / 'train' / 'cat').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere' / 'again').symlink_to(tmp_path / 'data')  # in a circle
  assert sorted(names_of('train', root)) == [f'train/cat/{i}.jpg' for i in range(3)] + [
    f'train/dog/{i}.jpg' for i in (1, 2)
  ]
  assert [os.path.relpath(file, root) for file in image_files([root])] == sorted(names_of('train', root))


def test_names_that_are_not_utf8(tmp_path, capfd):
  latin = os.fsdecode(b'K\xe4fer')
  try:
    root = write(
      tmp_path, f'train/bees/{latin}.jpg', 'train/bees/1.jpg', 'train/ants/1.jpg', 'train/ants/2.jpg'
    )
  except OSError:
    pytest.skip('this file system takes UTF-8 only')
  found = open_dataset('image_folder', 'train', root)
  assert sum(example.image == IMAGE for example in found.read(np.arange(4))) == 4
  names = [example.name for example in found.scan_all()]
  assert any(name.endswith('bees/K\\xe4fer.jpg') for name in names)
  assert ''.join(names).encode()
  write(tmp_path, f'train/{latin}/1.jpg')
  with pytest.raises(UsageError, match=r'name of the class .* is not UTF-8; rename its folder'):
    open_dataset('image_folder', 'train', root)
  assert open_dataset('image_folder', 'train', write_splits(tmp_path / latin)).name.encode()


def test_reading_that_fails_is_not_an_image_that_is_bad(tmp_path, monkeypatch):
  found = open_dataset('image_folder', 'train', write_splits(tmp_path))
  (image,) = found.read(np.array([0]))
  path, waited, failures = image.name, [], [errno.EIO, errno.ESTALE]
  monkeypatch.setattr(source.time, 'sleep', waited.append)

  def fails(file, *arguments, **options):
    if file == path and failures:
      code = failures.pop(0)
      raise OSError(code, os.strerror(code))
    return open(file, *arguments, **options)

  monkeypatch.setattr(source, 'open', fails, raising=False)
  assert found.read(np.array([0])) == [image]
  assert len(waited) == 2
  failures += [errno.EIO] * 9
  with pytest.raises(UsageError, match=r'cannot read .*: Input/output error; try again'):
    found.read(np.array([0]))
  os.remove(path)
  failures.clear()
  (missing,) = found.read(np.array([0]))
  assert isinstance(missing.image, UnreadableError)
  assert 'No such file' in str(missing.image)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
  root = write_splits(tmp_path)

  def refused(path):
    if str(path).endswith('dog'):
      raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    return scandir(path)

  scandir = os.scandir
  monkeypatch.setattr(os, 'scandir', refused)
  with pytest.raises(UsageError, match=r'cannot read the folder .*dog: Permission denied'):
    folder_source.folder_splits(root)
