"""`alexnet-flax prepare NAME --side N`: what it writes, that TFDS reads it, and that it survives kills."""

import io
import os
import subprocess
import tarfile

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alexnet_flax.cli.main import main
from alexnet_flax.data import image_header, loader, sampling
from alexnet_flax.data.prepare import resize
from alexnet_flax.data.prepare.color_pca import read_components
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.data.views import VIEW_NUMBERS, TrainView
from alexnet_flax.errors import UsageError
from tests.helpers import encode, smooth_image


@pytest.fixture
def folder(tmp_path):
  """Ten images of several sizes in each of two classes and two splits."""
  for split in ('train', 'validation'):
    for number in range(20):
      path = tmp_path / 'pets' / split / ('cat', 'dog')[number % 2] / f'{number}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encode(smooth_image(60 + number, 90 - number, number), 'PNG'))
  return tmp_path / 'pets'


def prepare(folder, *options):
  out = str(folder.parent / 'tfds')
  return main(['prepare', 'image_folder', '--data_dir', str(folder), '--out_dir', out, *options]), out


def resized_by_pillow(path, side):
  with Image.open(path) as opened:
    width, height = opened.size
    short = min(opened.size)
    size = (side * width // short, side * height // short)
    return np.asarray(opened.resize(size, Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize('crop', ['none', 'center'])
@pytest.mark.parametrize('encoding', ['jpeg', 'raw'])
def test_tfds_reads_it(folder, encoding, crop):
  code, out = prepare(folder, '--side', '32', '--encoding', encoding, '--crop', crop, '--quality', '100')
  assert code == 0
  name = 'pets_32' + ('_center' if crop == 'center' else '') + ('_raw' if encoding == 'raw' else '_q100')
  data, info = tfds.load(name, split='validation', data_dir=out, with_info=True)
  assert info.features['label'].names == ['cat', 'dog']
  assert {key: split.num_examples for key, split in info.splits.items()} == {'train': 20, 'validation': 20}
  seen = set()
  for example in tfds.as_numpy(data):
    name_of_file = example['file_name'].decode()
    seen.add(name_of_file)
    assert name_of_file.startswith(('cat', 'dog')[example['label']])
    expected = resized_by_pillow(folder / 'validation' / name_of_file, 32)
    if crop == 'center':
      top, left = (round((length - 32) / 2) for length in expected.shape[:2])
      expected = expected[top : top + 32, left : left + 32]
    assert example['image'].shape == expected.shape
    difference = np.abs(example['image'] - expected)
    assert difference.max() <= 1 if encoding == 'raw' else difference.mean() < 4
  assert len(seen) == 20
  ours = open_dataset(name, 'train', out)
  assert ours.num_examples == 20
  assert ours.class_names == ('cat', 'dog')


def test_color_components_are_those_of_all_training_pixels(folder):
  _, out = prepare(folder, '--side', '32', '--encoding', 'raw')
  data = tfds.load('pets_32_raw', split='train', data_dir=out)
  values = np.concatenate([example['image'].reshape(-1, 3) for example in tfds.as_numpy(data)]) / 255
  source = open_dataset('pets_32_raw', 'train', out)
  found = read_components(source.folder, 'pets_32_raw')
  vectors = np.array(found.eigenvectors)
  np.testing.assert_allclose(
    vectors.T @ np.diag(found.eigenvalues) @ vectors, np.cov(values.T, bias=True), atol=1e-9
  )


def killed_after_three_files(folder, monkeypatch):
  """Starts preparing, is interrupted, and returns the files written so far."""
  write, written = resize.write_shard, []

  def killed(path, *arguments):
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(path)
    write(path, *arguments)

  monkeypatch.setattr(resize, 'write_shard', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(folder, '--side', '32', '--encoding', 'raw')
  return written


def test_an_interrupted_run_continues_with_the_next_shard(folder, monkeypatch, capsys):
  monkeypatch.setattr(resize, '_SHARD_BYTES', 6 * 32 * 32 * 4)  # six images each
  write, written = resize.write_shard, killed_after_three_files(folder, monkeypatch)
  out = folder.parent / 'tfds'
  assert not list(out.rglob('dataset_info.json'))  # an incomplete data set is not visible
  before = {path: path.stat().st_mtime_ns for path in written}
  (written[2].parent / f'.partial-1-{written[2].name}').write_bytes(b'half')
  again = []
  monkeypatch.setattr(resize, 'write_shard', lambda path, *rest: (again.append(path), write(path, *rest)))
  assert prepare(folder, '--side', '32', '--encoding', 'raw')[0] == 0
  assert len(again) == 8 - 3
  assert {path: path.stat().st_mtime_ns for path in written} == before
  source = open_dataset('pets_32_raw', 'train', str(out))
  names = [example.name for example in source.read(np.arange(20))]
  assert len(set(names)) == 20
  assert not list(out.rglob('*partial*'))
  assert not list(out.rglob('.statistics*'))
  capsys.readouterr()
  assert prepare(folder, '--side', '32', '--encoding', 'raw')[0] == 0
  assert 'already' in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'', b'{"splits', b'\xff', b'null'])
def test_damaged_files_of_a_prepared_data_set(folder, capsys, content):
  code, out = prepare(folder, '--side', '32')
  (place,) = (folder.parent / 'tfds' / 'pets_32_q90').iterdir()
  (place / 'rgb_components.json').write_bytes(content)
  with pytest.raises(
    UsageError, match=r'rgb_components.json is damaged; remove .* and prepare the data set again'
  ):
    read_components(str(place), 'pets_32_q90')
  (place / 'prepared_from.json').write_bytes(content)
  assert (code, prepare(folder, '--side', '32')[0]) == (0, 2)
  assert 'was made from other images; remove it' in capsys.readouterr().err
  (place / 'dataset_info.json').unlink()
  assert prepare(folder, '--side', '32')[0] == 0  # begun anew
  assert open_dataset('pets_32_q90', 'train', out).num_examples == 20


def test_bad_images_are_skipped_on_request(folder, capsys):
  bad = folder / 'train' / 'cat' / '0.png'
  bad.write_bytes(b'not an image')
  assert prepare(folder, '--side', '32')[0] == 2
  said = capsys.readouterr().err
  assert '0.png cannot be decoded: not an image' in said
  code, out = prepare(folder, '--side', '32', '--on_bad_image', 'skip')
  assert code == 0
  assert '1 images cannot be decoded' in capsys.readouterr().out
  assert open_dataset('pets_32_q90', 'train', out).num_examples == 19


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--side', '4'], r'--side (=4) must be at least 8'),
    (['--side', '32', '--quality', '0'], '--quality (=0) must be 1 ... 100'),
    (['--side', '32', '--encoding', 'rwa'], "did you mean 'raw'"),
    (['--side', '32', '--crop', 'centre'], "did you mean 'center'"),
  ],
)
def test_error_messages_have_one_line(folder, capsys, options, message):
  code, _ = prepare(folder, *options)
  said = capsys.readouterr().err
  assert code == 2
  assert said.count('\n') == 1
  assert message in said
  assert not (folder.parent / 'tfds').exists()


def test_crops_of_raw_images_are_exact(folder):
  """A batch equals the crops of the stored pixels, for any number of threads and processes."""
  _, out = prepare(folder, '--side', '32', '--encoding', 'raw')
  source, view = open_dataset('pets_32_raw', 'train', out), TrainView(28, 'random_crop', resize_side=32)
  arguments = {'seed': 3, 'batch_size': 8, 'first_step': 2, 'last_step': 9}
  streams = [list(loader.train_batches(source, view, **arguments, num_threads=n)) for n in (1, 2, 8)]
  halves = [list(loader.train_batches(source, view, **arguments, process=p, num_processes=2)) for p in (0, 1)]
  streams.append([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)])
  mirrored = 0
  for step in range(2, 9):
    indices, numbers = sampling.batch_indices(3, step, 8, 20), sampling.view_numbers(3, step, 8, VIEW_NUMBERS)
    for row, example in enumerate(source.read(indices)):
      pixels = image_header.decode_pixels(example.image)
      windows = view.windows(np.array([pixels.shape[:2]]), numbers[[row]])
      (top, left, _, _), mirror = windows.boxes[0], windows.mirrored[0]
      expected = pixels[top : top + 28, left : left + 28]
      mirrored += mirror
      for stream in streams:
        np.testing.assert_array_equal(
          stream[step - 2]['image'][row], expected[:, ::-1] if mirror else expected
        )
        assert stream[step - 2]['label'][row] == example.label
  assert 0 < mirrored < 56


def test_raw_images_of_another_size_are_resized(folder):
  """A crop of 28 from 32 is a crop of 35 from 40, resized."""
  _, out = prepare(folder, '--side', '40', '--encoding', 'raw')
  source, view = open_dataset('pets_40_raw', 'train', out), TrainView(28, 'random_crop', resize_side=32)
  arguments = {'seed': 3, 'batch_size': 8, 'first_step': 0, 'last_step': 1}
  (batch,) = loader.train_batches(source, view, **arguments)
  numbers = sampling.view_numbers(3, 0, 8, VIEW_NUMBERS)
  for row, example in enumerate(source.read(batch['index'])):
    pixels = image_header.decode_pixels(example.image)
    windows = view.windows(np.array([pixels.shape[:2]]), numbers[[row]])
    top, left, height, width = windows.boxes[0].tolist()
    assert (height, width) == (35, 35)
    window = Image.fromarray(pixels[top : top + 35, left : left + 35])
    expected = np.asarray(window.resize((28, 28), Image.Resampling.BILINEAR)).astype(int)
    expected = expected[:, ::-1] if windows.mirrored[0] else expected
    assert np.abs(batch['image'][row] - expected).mean() < 3  # bilinear, and antialiased bilinear


def test_a_changed_source_starts_over_or_is_refused(folder, monkeypatch, capsys):
  """Twenty images in four files, interrupted after three; then two images are added."""
  monkeypatch.setattr(resize, '_SHARD_BYTES', 6 * 32 * 32 * 4)
  write = resize.write_shard
  killed_after_three_files(folder, monkeypatch)
  monkeypatch.setattr(resize, 'write_shard', write)
  for number in (20, 21):
    (folder / 'train' / 'cat' / f'{number}.png').write_bytes(encode(smooth_image(40, 50, number), 'PNG'))
  code, out = prepare(folder, '--side', '32', '--encoding', 'raw')
  assert code == 0
  source = open_dataset('pets_32_raw', 'train', out)
  assert len({example.name for example in source.read(np.arange(22))}) == 22
  (folder / 'train' / 'cat' / '20.png').unlink()
  capsys.readouterr()
  assert prepare(folder, '--side', '32', '--encoding', 'raw')[0] == 2
  assert 'was made from other images; remove it' in capsys.readouterr().err


def test_two_processes_at_once(folder, capsys):
  place = folder.parent / 'tfds' / 'pets_32_q90' / '1.0.0'
  place.mkdir(parents=True)
  with filelock.FileLock(place / '.lock'):
    assert prepare(folder, '--side', '32')[0] == 2
  assert 'another process is writing' in capsys.readouterr().err
  assert prepare(folder, '--side', '32')[0] == 0


def test_a_folder_whose_name_starts_with_a_digit(folder):
  moved = folder.rename(folder.parent / '2020 pets')
  assert prepare(moved, '--side', '32')[0] == 0
  assert (
    tfds.load('d_2020_pets_32_q90', split='train', data_dir=str(folder.parent / 'tfds')).cardinality() == 20
  )


def test_an_extremely_thin_image(folder, capsys):
  (folder / 'train' / 'cat' / 'line.png').write_bytes(encode(smooth_image(1, 1000, 0), 'PNG'))
  assert prepare(folder, '--side', '256')[0] == 2
  assert 'line.png cannot be decoded: 1x1000 would be resized to 256,000 pixels' in capsys.readouterr().err
  assert prepare(folder, '--side', '256', '--on_bad_image', 'skip')[0] == 0


def test_a_chunk_of_only_bad_images(folder, monkeypatch):
  monkeypatch.setattr(resize, '_CHUNK', 2)
  for name in ('x', 'y', 'z'):
    (folder / 'train' / 'dog' / f'{name}.png').write_bytes(b'')
  code, out = prepare(folder, '--side', '32', '--on_bad_image', 'skip')
  assert code == 0
  assert open_dataset('pets_32_q90', 'train', out).num_examples == 20


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small file system')
def test_a_full_disk(folder, tmp_path, capsys):
  small = tmp_path / 'small'
  small.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100k', 'tmpfs', str(small)], check=True)
  try:
    code = main(
      ['prepare', 'image_folder', '--data_dir', str(folder), '--out_dir', str(small), '--side', '200']
    )
    said = capsys.readouterr().err
    assert code == 2
    assert 'cannot write' in said
    assert 'No space left on device; finished shards are kept' in said
    assert not list(small.rglob('*partial*'))
  finally:
    subprocess.run(['umount', '-l', str(small)], check=True)


def test_options_for_smaller_images_need_a_side(capsys):
  assert main(['prepare', 'digits', '--encoding', 'raw']) == 2
  assert '--encoding is for smaller images; add their --side' in capsys.readouterr().err


def test_archives_cannot_leave_their_folder(tmp_path):
  """TFDS, which unpacks what `prepare` downloads, leaves such members out."""
  from tensorflow_datasets.core.download import extractor

  path = tmp_path / 'a.tar'
  with tarfile.open(path, 'w') as archive:
    for name in ('../outside', '/tmp/absolute', 'inside'):
      info = tarfile.TarInfo(name)
      info.size = 1
      archive.addfile(info, io.BytesIO(b'x'))
  assert [name for name, _ in extractor.iter_tar(path)] == ['inside']
