"""Opens TFDS data sets and folders of images by name, with random access to their examples.

TFDS describes data sets without importing TensorFlow, and so does this module. It reads examples by index,
because the training order is ours (`sampling.py`) and TFDS's readers only know their own.
"""

import contextlib
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data import digits, tfrecord
from alexnet_flax.data.folder_source import folder_splits, open_folder, split_parts
from alexnet_flax.data.image_header import Encoded
from alexnet_flax.data.images import UnreadableError
from alexnet_flax.data.source import Example, Source
from alexnet_flax.data.tfrecord import parse_example, read_integers
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.files import buckets, expanded

IMAGE_FOLDER = 'image_folder'
_AHEAD = 8  # batches, or parts of them, that are read from a bucket at the same time
_RECORDS = r'\.(tfrecord|array_record|riegeli|bagz)(-|$)'  # in the names of files
_Parse = Callable[[bytes | memoryview | UnreadableError], Example]
# The features in which TFDS's builders store an image's file name.
_NAMES = ('file_name', 'filename', 'image/filename', 'image/file_name', 'image_name', 'image_id', 'id')


def open_dataset(
  name: str, split: str, data_dir: str | None = None, verify: bool = True, mirror: str | None = None
) -> Source:
  """Opens a split of a prepared data set.

  Args:
    name: The name of a TFDS data set ('imagenet2012'), 'digits' (prepared on first use), or 'image_folder'
      (SPLIT/CLASS/image below `data_dir`, in an order that mixes the classes).
    split: A split or a slice of splits in TFDS's notation ('train', 'test[:50%]', 'train+test').
    data_dir: The folder of the data sets, also in a bucket; TFDS's default if None.
    verify: Compare the checksum of each record that is read. A damaged record is a bad image.
    mirror: A folder to which the files of a data set in a bucket are copied, once, instead of reading them
      from there record by record, as is possible with TFRecord.

  Raises:
    UsageError: The data set is unknown, not prepared, damaged or without images, or has no such split.
  """
  if mirror and not buckets.is_bucket(data_dir):
    raise UsageError(f'data.mirror is for a data_dir in a bucket, not for {data_dir}; leave it out')
  if name == IMAGE_FOLDER:
    return open_folder(split, _mirrored_folder(data_dir, mirror) if buckets.is_bucket(data_dir) else data_dir)
  builder = _prepared_builder(name, data_dir, mirror)
  info, chosen = builder.info, _split_info(builder, split)
  files = chosen.file_instructions
  is_remote = False
  if data_dir and buckets.is_bucket(data_dir):
    files, is_remote = _files_in_bucket(files, data_dir, mirror)
  elif absent := [part.filename for part in files if not tfds.core.Path(part.filename).exists()]:
    found = f'{len(absent)} of {len(files)} files of {name}:{split} are missing, the first is {absent[0]}'
    raise UsageError(f'{found}; prepare the data set again')
  parse, class_names = _parser(name, dict(info.features), info.supervised_keys)
  if info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
    if is_remote:
      raise _needs_mirror('ArrayRecord files', data_dir)
    scan = read = functools.partial(_read_array_records, builder.as_data_source(split).data_source)
  else:
    index = tfrecord.record_index(files)
    scan = functools.partial(tfrecord.read_records, index)
    read = functools.partial(tfrecord.read_records, index, verify=verify)
  return Source(
    name=f'{name}:{split}',
    num_examples=chosen.num_examples,
    class_names=class_names,
    read=lambda numbers: [parse(record) for record in read(numbers)],
    scan=lambda numbers: [parse(record) for record in scan(numbers)],
    folder=str(builder.data_dir),
    identity=f'{info.full_name}:{split}',
    parts=split_parts(split, info.splits),
    ahead=_AHEAD if is_remote else 0,
    is_published=re.match(r'tensorflow_datasets\.(?!core\.)', type(builder).__module__) is not None,
  )


def _files_in_bucket(parts: list[Any], data_dir: str, mirror: str | None) -> tuple[list[Any], bool]:
  """Returns TFDS's file instructions with URLs, and True; with a mirror, as they are once it has the files.

  Raises UsageError if a file is missing.
  """
  folder = pathlib.Path(parts[0].filename).parent
  root = expanded(mirror) if mirror else buckets.copy_place(data_dir)
  url = '/'.join([data_dir.rstrip('/'), *folder.relative_to(root).parts])
  there = buckets.listing(url)
  wanted = {name: there.get(name) for name in (pathlib.Path(part.filename).name for part in parts)}
  if absent := [name for name, one in wanted.items() if one is None]:
    found = f'{len(absent)} of {len(wanted)} files in {url} are missing, the first is {absent[0]}'
    raise UsageError(f'{found}; copy the data set there again')
  if mirror:
    buckets.fetch(url, folder, {name: one for name, one in wanted.items() if one}, progress=True)
    return parts, False
  return [part.replace(filename=f'{url}/{pathlib.Path(part.filename).name}') for part in parts], True


def _mirrored_folder(data_dir: str | None, mirror: str | None) -> str:
  """Returns a folder of images in a bucket, copied to `mirror`."""
  if mirror is None:
    raise _needs_mirror('folders of images', data_dir)
  objects = buckets.listing(str(data_dir))
  buckets.fetch(str(data_dir).rstrip('/'), expanded(mirror), objects, objects, progress=True)
  return mirror


def _needs_mirror(what: str, data_dir: str | None) -> UsageError:
  advice = 'add --config.data.mirror=FOLDER, or copy it and give the folder of the copy as data_dir'
  return UsageError(f'{data_dir}: {what} are read from a disk alone; {advice}')


def _read_array_records(reader: Any, numbers: np.ndarray) -> list[Any]:
  """Returns records, or the reasons why they cannot be read; ArrayRecord compares checksums itself."""
  try:
    return reader.__getitems__(numbers.tolist())
  except (RuntimeError, ValueError, OSError) as error:
    if len(numbers) > 1:
      return [_read_array_records(reader, numbers[[row]])[0] for row in range(len(numbers))]
    return [UnreadableError(' '.join(str(error).split()))]


def split_names(name: str, data_dir: str | None = None) -> list[str]:
  """Returns the splits of a prepared data set; raises UsageError if it is unknown or not prepared."""
  if name == IMAGE_FOLDER:
    return folder_splits(_mirrored_folder(data_dir, None) if buckets.is_bucket(data_dir) else data_dir)
  return sorted(_prepared_builder(name, data_dir).info.splits)


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> None:
  """Downloads a TFDS data set and prepares it with TFDS's own builder, in `data_dir` or TFDS's folder.

  `manual_dir` holds archives that must be downloaded by hand (ImageNet's). Raises UsageError if the data set
  is unknown, or an archive is missing.
  """
  if name == IMAGE_FOLDER:
    raise UsageError(f'{IMAGE_FOLDER} needs no preparation; give its folder as --config.data.data_dir')
  for place in filter(buckets.is_bucket, (data_dir, manual_dir)):
    raise UsageError(f'{place}: a data set is prepared on a disk; copy its folder to the bucket then')
  builder = _builder(name, data_dir)
  config = tfds.download.DownloadConfig(manual_dir=manual_dir and expanded(manual_dir))
  try:
    builder.download_and_prepare(download_config=config)
  except ModuleNotFoundError:
    raise
  except Exception as error:  # a missing or damaged archive, a full disk: TFDS's builders raise anything
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UsageError(f'cannot prepare {name!r}: {reason}; if an archive is damaged, get it again') from None
  _require_splits(builder)
  splits = ', '.join(f'{key} ({info.num_examples:,})' for key, info in builder.info.splits.items())
  print(f'{builder.info.full_name} is in {builder.data_dir}: {splits}')


def _prepared_builder(name: str, data_dir: str | None, mirror: str | None = None) -> tfds.core.DatasetBuilder:
  is_remote = data_dir is not None and buckets.is_bucket(data_dir)
  builder = _builder(name, str(_described(name, data_dir, mirror)) if data_dir and is_remote else data_dir)
  if not builder.info.splits:
    if is_remote:
      raise UsageError(
        f'the data set {name!r} is not in {data_dir}; prepare it in a folder, and copy that there'
      )
    if name != digits.NAME:
      command = f'alexnet-flax prepare {name}' + (f' --data_dir={data_dir}' if data_dir else '')
      raise UsageError(f'the data set {name!r} is not prepared in {builder.data_dir}; run: {command}')
    tfds.disable_progress_bar()  # preparing takes seconds
    try:
      builder.download_and_prepare()
    except OSError as error:
      raise UsageError(f'cannot write to data_dir (={data_dir}): {error.strerror or error}') from None
    _require_splits(builder)
  return builder


def _described(name: str, data_dir: str, mirror: str | None) -> pathlib.Path:
  """Returns a folder of TFDS data sets with copies of what describes one of a bucket: all but the records."""
  root, (folder, *_) = expanded(mirror) if mirror else buckets.copy_place(data_dir), re.split('[/:]', name)
  url = f'{data_dir.rstrip("/")}/{folder}'
  found = {key: one for key, one in buckets.listing(url).items() if not re.search(_RECORDS, key)}
  buckets.fetch(url, root / folder, found)
  return root


def _require_splits(builder: tfds.core.DatasetBuilder) -> None:
  if not builder.info.splits:  # TFDS takes the folder for prepared
    raise UsageError(f'{builder.data_dir} is not complete; remove it and prepare the data set again')


@contextlib.contextmanager
def _no_folder_left() -> Iterator[None]:
  """A block after which the folder is gone that TFDS makes, and leaves, for each builder without data."""
  before = tempfile.tempdir
  with tempfile.TemporaryDirectory() as folder:
    tempfile.tempdir = folder
    try:
      yield
    finally:
      tempfile.tempdir = before


@_no_folder_left()
def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  data_dir = data_dir and str(expanded(data_dir))
  try:
    if name == digits.NAME:
      return digits.digits_builder(data_dir=data_dir)
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    error = unknown_name('data set', name, [IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)])
    raise UsageError(str(error).partition(' (choices')[0]) from None
  except ModuleNotFoundError:
    raise
  except Exception as error:  # an unknown configuration or version; for a damaged folder TFDS raises anything
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
    place = data_dir or tfds.core.constants.DATA_DIR
    hint = f'if its folder in {place} is damaged, remove that and prepare it again'
    raise UsageError(f'data set {name!r}: {reason}; {hint}') from None


def _split_info(builder: tfds.core.DatasetBuilder, split: str) -> Any:
  try:
    info = builder.info.splits[split]
  except (KeyError, ValueError, NotImplementedError):  # the last is TFDS's of 'all[:50%]'
    error = unknown_name('split', split, builder.info.splits)
    raise UsageError(f'{builder.name}: {error}; a slice is written train[:80%]') from None
  if info.num_examples <= 0:
    raise UsageError(f'{builder.name}: the split {split!r} has no examples')
  return info


def _parser(name: str, features: Mapping[str, Any], supervised_keys: Any) -> tuple[_Parse, tuple[str, ...]]:
  """Returns the function from a record to an example, and the class names."""
  name_key = next((key for key in _NAMES if type(features.get(key)) is tfds.features.Text), None)
  correct_key = None
  match supervised_keys:
    case (image_key, 'real_label') if _is_image(features.get(image_key)):  # ImageNet-ReaL
      label_key, correct_key = 'original_label', 'real_label'
    case (image_key, label_key) if _is_image(features.get(image_key)) and isinstance(
      features.get(label_key), tfds.features.ClassLabel
    ):
      pass
    case _:
      raise UsageError(f'the data set {name!r} does not consist of images with one class each')
  feature = features[image_key]
  if feature.np_dtype not in (np.uint8, np.uint16):
    raise UsageError(f'the images of {name!r} are {np.dtype(feature.np_dtype)}; they must be uint8 or uint16')

  def parse(record: bytes | memoryview | UnreadableError) -> Example:
    if isinstance(record, UnreadableError):
      return Example(record, -1, '')
    image: memoryview | Encoded
    try:
      values = parse_example(record)
      if isinstance(feature, tfds.features.Image):
        image = values[image_key]
      elif None in feature.shape:  # TFDS then stores the shape beside the pixels
        height, width, _ = read_integers(values[f'{image_key}/shape'])
        image = Encoded(values[f'{image_key}/value'], 'raw', height, width)
      else:
        image = Encoded(values[image_key], 'raw', *feature.shape[:2])
      (label,) = read_integers(values[label_key])
      file_name = str(values[name_key], 'utf-8', 'backslashreplace') if name_key else ''
      correct = tuple(read_integers(values[correct_key])) if correct_key else None
    except (KeyError, IndexError, ValueError, StopIteration):
      return Example(UnreadableError('its record does not hold what the data set describes'), -1, '')
    return Example(image, label, file_name, correct)

  return parse, tuple(features[label_key].names)


def _is_image(feature: Any) -> bool:
  if isinstance(feature, tfds.features.Image):
    return True
  is_tensor = type(feature) is tfds.features.Tensor and feature._encoding is tfds.features.Encoding.BYTES
  return is_tensor and feature.np_dtype == np.uint8 and len(feature.shape) == 3 and feature.shape[-1] == 3
