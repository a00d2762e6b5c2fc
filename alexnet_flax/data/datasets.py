"""Which examples exist: TFDS data sets by name, and folders of pictures, with random access.

TFDS describes a data set without TensorFlow, and so does this module, except for folders. Records
are fetched by number, for the order of training is ours (`order.py`) and TFDS's own readers know
only their own.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds

from alexnet_flax.data import digits, records
from alexnet_flax.data.records import as_bytes
from alexnet_flax.errors import UsageError, unknown_name

if TYPE_CHECKING:
  import tensorflow as tf

IMAGE_FOLDER = 'image_folder'


@dataclasses.dataclass(frozen=True)
class Source:
  """The examples of one split, by number.

  Attributes:
    name: data set and split, for messages.
    num_examples: how many there are.
    class_names: of the labels 0, 1, ...
    fetch: numbers, int [N] -> arrays [N] of bytes and numbers, in Python.
    parse: one fetched example -> (encoded picture, int64 label), in TensorFlow.
  """

  name: str
  num_examples: int
  class_names: tuple[str, ...]
  fetch: Callable[[np.ndarray], dict[str, np.ndarray]]
  parse: Callable[[dict[str, 'tf.Tensor']], tuple['tf.Tensor', 'tf.Tensor']]


def open_dataset(name: str, split: str, data_dir: str | None = None) -> Source:
  """A split of a prepared data set.

  Args:
    name: of a TFDS data set ('imagenet2012'), 'digits' (prepared on first use), or 'image_folder'
      (SPLIT/CLASS/picture below `data_dir`, in an order that mixes the classes).
    split: a split or a slice of splits, in TFDS's notation ('train', 'test[:50%]', 'train+test').
    data_dir: where data sets lie; TFDS's default if None.

  Raises:
    UsageError: the data set is unknown, not prepared or without pictures, or has no such split.
  """
  if name == IMAGE_FOLDER:
    return _open_folder(split, data_dir)
  builder = _builder(name, data_dir)
  if not builder.info.splits:
    if name != digits.Digits.name:
      where = f' --data_dir={data_dir}' if data_dir else ''
      raise UsageError(
        f'the data set {name!r} is not prepared in {builder.data_dir}; run: alexnet-flax prepare'
        f' {name}{where}'
      )
    tfds.disable_progress_bar()  # it takes seconds
    try:
      builder.download_and_prepare()
    except OSError as error:
      raise UsageError(f'cannot write to data_dir (={data_dir}): {error.strerror or error}') from None
  image_key, label_key = _keys(name, builder)
  names = builder.info.features[label_key].names
  source = functools.partial(
    Source,
    name=f'{name}:{split}',
    num_examples=_split_info(builder, split).num_examples,
    class_names=tuple(names),
    parse=functools.partial(_parse_record, builder.info.features, image_key, label_key),
  )
  if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
    reader = builder.as_data_source(split).data_source
    return source(fetch=lambda numbers: {'record': as_bytes(reader.__getitems__(numbers.tolist()))})
  index = records.record_index(_split_info(builder, split).file_instructions)
  return source(fetch=lambda numbers: {'record': records.read_records(index, numbers)})


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> None:
  """Downloads and prepares a TFDS data set, as TFDS's own builder does it.

  Args:
    name: of a TFDS data set.
    data_dir: where to write; TFDS's default if None.
    manual_dir: where archives lie that a person must download (ImageNet's).

  Raises:
    UsageError: the data set is unknown, or an archive is missing.
  """
  if name == IMAGE_FOLDER:
    raise UsageError(f'{IMAGE_FOLDER} needs no preparing; give its folder as --config.data.data_dir')
  builder = _builder(name, data_dir)
  config = tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.expanduser(manual_dir))
  try:
    builder.download_and_prepare(download_config=config)
  except (AssertionError, OSError) as error:  # an archive that is not there; a download that fails
    raise UsageError(f'cannot prepare {name!r}: {" ".join(str(error).split())}') from None
  splits = ', '.join(f'{key} ({info.num_examples:,})' for key, info in builder.info.splits.items())
  print(f'{builder.info.full_name} is in {builder.data_dir}: {splits}')


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  if name == digits.Digits.name:
    return digits.Digits(data_dir=data_dir)
  try:
    return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    choices = [IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)]
    error = unknown_name('data set', name, choices)
    raise UsageError(str(error).partition(' (choices')[0]) from None
  except (ValueError, AssertionError) as error:  # an unknown configuration or version of a known data set
    raise UsageError(f'data set {name!r}: {_first_line(error)}') from None


def _split_info(builder: tfds.core.DatasetBuilder, split: str) -> Any:
  try:
    info = builder.info.splits[split]
  except (KeyError, ValueError):
    error = unknown_name('split', split, builder.info.splits)
    raise UsageError(f'{builder.name}: {error}; a slice is written train[:80%]') from None
  if info.num_examples <= 0:
    raise UsageError(f'{builder.name}: the split {split!r} has no examples')
  return info


def _keys(name: str, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
  keys = builder.info.supervised_keys
  if keys and len(keys) == 2:
    image, label = (builder.info.features[key] for key in keys)
    if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
      return keys
  raise UsageError(f'the data set {name!r} is not one of pictures with one class each')


def _parse_record(
  features: Any, image_key: str, label_key: str, example: dict[str, 'tf.Tensor']
) -> tuple['tf.Tensor', 'tf.Tensor']:
  parsed = features.deserialize_example(example['record'], decoders={image_key: tfds.decode.SkipDecoding()})
  return parsed[image_key], parsed[label_key]


def _open_folder(split: str, data_dir: str | None) -> Source:
  if data_dir is None or not os.path.isdir(os.path.expanduser(data_dir)):
    raise UsageError(f'{IMAGE_FOLDER}: data_dir (={data_dir}) must be a folder of SPLIT/CLASS/picture')
  builder = tfds.folder_dataset.ImageFolder(os.path.expanduser(data_dir))
  pictures = builder._split_examples  # shuffled, always alike; there is no public way to the files
  if not any(pictures.values()):
    raise UsageError(f'no pictures in {data_dir}; it must hold SPLIT/CLASS/picture.jpg (or .jpeg, .png)')
  names = builder.info.features['label'].names
  if len(names) < 2:
    raise UsageError(f'{data_dir} holds one class ({names[0]!r}); a classifier needs at least two')
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
  except (KeyError, ValueError):
    raise UsageError(f'{data_dir}: {unknown_name("split", split, sorted(pictures))}') from None
  chosen = [example for part in parts for example in pictures[part.splitname][part.from_ : part.to]]
  if not chosen:
    raise UsageError(f'{data_dir}: the split {split!r} has no pictures')
  paths = as_bytes([os.fsencode(example.image_path) for example in chosen])
  labels = np.array([names.index(example.label) for example in chosen], np.int64)

  def parse(example: dict[str, 'tf.Tensor']) -> tuple['tf.Tensor', 'tf.Tensor']:
    import tensorflow as tf

    return tf.io.read_file(example['path']), example['label']

  return Source(
    name=f'{data_dir}:{split}',
    num_examples=len(chosen),
    class_names=tuple(names),
    fetch=lambda numbers: {'path': paths[numbers], 'label': labels[numbers]},
    parse=parse,
  )


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]
