"""`alexnet-flax prepare NAME --side 256`: rewrites a data set with smaller images, which decode much faster.

The result is a TFDS data set with its own name and version, in TFRecord files. Each file (a shard) is written
atomically, and the metadata that TFDS looks for comes last. An interrupted run therefore continues with the
next shard, and an incomplete data set is never visible.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

import filelock
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from alexnet_flax.data.bad_images import BadImages, Policy
from alexnet_flax.data.decode import LONGEST
from alexnet_flax.data.image_header import Encoded, decode_pixels
from alexnet_flax.data.images import UnreadableError, evaluation_crops, resize_short_side
from alexnet_flax.data.loader import Plan, Reader
from alexnet_flax.data.prepare.color_pca import principal_components, write_components
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import IMAGE_FOLDER, open_dataset, split_names
from alexnet_flax.data.tfrecord import framed
from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.files import atomic_path, expanded, read_json, write_text
from alexnet_flax.files.buckets import is_bucket

VERSION = '1.0.0'
_SHARD_BYTES = 256 << 20
_PLAN = 'prepared_from.json'  # source and options; a run only continues with the same ones
_LOCK = '.lock'
Encoding = Literal['jpeg', 'raw']
Center = Literal['none', 'center']
_CHUNK = 64  # images decoded together


@dataclasses.dataclass(frozen=True)
class ImageFormat:
  """The size and encoding of the images of a rewritten data set."""

  side: int  # the short one, in pixels
  encoding: Encoding = 'jpeg'  # 'raw' are unencoded pixels
  quality: int = 90  # of JPEG, 1 ... 100
  crop: Center = 'none'  # 'center' is the central square (Krizhevsky et al. 2012, section 2)

  def __post_init__(self) -> None:
    for key, value, kind in (('--encoding', self.encoding, Encoding), ('--crop', self.crop, Center)):
      if value not in typing.get_args(kind):
        raise unknown_name(f'value of {key}:', value, typing.get_args(kind))
    if self.side < 8:
      raise UsageError(f'--side (={self.side}) must be at least 8')
    if not 1 <= self.quality <= 100:
      raise UsageError(f'--quality (={self.quality}) must be 1 ... 100')

  def suffix(self) -> str:
    """The suffix of the data set's name: '256_q90', '256_center_raw'."""
    kind = 'raw' if self.encoding == 'raw' else f'q{self.quality}'
    return f'{self.side}_center_{kind}' if self.crop == 'center' else f'{self.side}_{kind}'

  def features(self, class_names: Sequence[str]) -> Any:
    """TFDS's description of the data set's examples."""
    side = self.side if self.crop == 'center' else None
    image: Any = tfds.features.Image(shape=(side, side, 3), encoding_format='jpeg')
    if self.encoding == 'raw':
      image = tfds.features.Tensor(shape=(side, side, 3), dtype=np.uint8, encoding='bytes')
    label = tfds.features.ClassLabel(names=list(class_names))
    return tfds.features.FeaturesDict({'image': image, 'label': label, 'file_name': tfds.features.Text()})


def prepare_smaller(
  name: str,
  image_format: ImageFormat,
  *,
  data_dir: str | None = None,
  out_dir: str | None = None,
  on_bad_image: Policy = 'error',
) -> str:
  """Rewrites a data set with resized images, and returns its name; labels, class and file names are kept.

  It also computes the principal components of the colours of the split 'train', for `augment.py`. Raises
  UsageError if the data set is not prepared, an image cannot be decoded, or the disk is full.

  Args:
    name: The name of a prepared TFDS data set, or 'image_folder'.
    image_format: The size and encoding of the new images.
    data_dir: The folder of the data set.
    out_dir: The folder to write to; `data_dir` if None, or TFDS's default folder for an 'image_folder'.
    on_bad_image: 'skip' leaves out images that cannot be decoded.
  """
  is_folder = name == IMAGE_FOLDER
  base = pathlib.Path(data_dir or '').resolve().name if is_folder else name.partition(':')[0]
  new_name = re.sub(r'\W+', '_', f'{base}_{image_format.suffix()}').lower()
  new_name = new_name if new_name[0].isalpha() else f'd_{new_name}'  # TFDS requires a letter
  root = out_dir or (None if is_folder else data_dir)
  if is_bucket(root):
    raise UsageError(
      f'{root}: a data set is prepared on a disk; add --out_dir, and copy it to the bucket then'
    )
  folder = expanded(root or tfds.core.constants.DATA_DIR) / new_name / VERSION
  bad = BadImages(on_bad_image, lambda line: tqdm.write(line), '--on_bad_image=skip')
  sources = {split: open_dataset(name, split, data_dir) for split in split_names(name, data_dir)}
  plan = {
    'splits': {split: [source.identity, source.num_examples] for split, source in sources.items()},
    'form': dataclasses.asdict(image_format),
    'on_bad_image': on_bad_image,
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / _LOCK, blocking=False):
      if _is_done(folder, plan):
        print(f'{new_name} is already in {folder}')
        return new_name
      total = sum(source.num_examples for source in sources.values())
      encode, splits = functools.partial(_encode, image_format), []
      with tqdm(total=total, unit='image', desc=new_name) as bar:
        for split, source in sources.items():
          named = {'dataset_name': new_name, 'split': split, 'filetype_suffix': 'tfrecord'}
          template = tfds.core.ShardedFileTemplate(data_dir=folder, **named)
          splits.append(_write_split(Reader(source, encode, bad, -1), template, image_format, bar))
      skipped = _write_metadata(folder, image_format, next(iter(sources.values())), splits)
  except filelock.Timeout:
    raise UsageError(f'another process is writing {folder}; wait for it') from None
  except OSError as error:
    raise UsageError(f'cannot write {folder}: {error.strerror or error}; finished shards are kept') from None
  counts = ', '.join(f'{info.name} ({info.num_examples:,})' for info in splits)
  print(f'{new_name} is in {folder}: {counts}')
  if skipped:
    print(f'{skipped} images cannot be decoded and were skipped')
  return new_name


def _is_done(folder: pathlib.Path, plan: dict[str, Any]) -> bool:
  """Whether the folder contains the finished plan. Parts of another plan are removed.

  Raises UsageError if it contains another finished plan.
  """
  path, plan = folder / _PLAN, json.loads(json.dumps(plan))
  try:
    found = read_json(path)
  except UsageError:  # damaged: nothing is known of what lies there
    found = None
  if (folder / 'dataset_info.json').exists():
    if found != plan:
      raise UsageError(f'{folder} was made from other images; remove it, or give another --out_dir')
    return True
  if found != plan:
    for old in folder.iterdir():
      if old.name != _LOCK:
        old.unlink()
    write_text(path, json.dumps(plan))
  return False


def _write_split(reader: Reader, template: Any, image_format: ImageFormat, bar: 'tqdm[Any]') -> Any:
  size = image_format.side**2 * 4  # three channels, with a long side of about 4 / 3 of the short side
  per_shard = max(_SHARD_BYTES // (size if image_format.encoding == 'raw' else size // 8), 1)
  count, split = -(-reader.source.num_examples // per_shard), template.split
  features = image_format.features(reader.source.class_names)
  lengths, written = [], 0
  for shard in range(count):
    path = pathlib.Path(template.sharded_filepath(shard_index=shard, num_shards=count))
    statistics = path.with_name(f'.statistics-{split}-{shard:05d}.json')
    indices = np.arange(shard * per_shard, min((shard + 1) * per_shard, reader.source.num_examples))
    if not (path.exists() and statistics.exists()):
      write_shard(path, statistics, reader, indices, features, bar)
    else:
      bar.update(len(indices))
    lengths.append((read_json(statistics) or {})['images'])
    written += path.stat().st_size
  return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=written, filename_template=template)


def _write_metadata(
  folder: pathlib.Path, image_format: ImageFormat, source: Source, splits: Sequence[Any]
) -> int:
  """Writes the colour components and then TFDS's metadata; returns the number of skipped images."""
  every = {path.name: read_json(path) or {} for path in sorted(folder.glob('.statistics-*.json'))}
  train = [shard for name, shard in every.items() if name.startswith('.statistics-train-')]
  if train:
    pixels = sum(shard['pixels'] for shard in train)
    sums, products = (np.sum([shard[key] for shard in train], axis=0) for key in ('sums', 'products'))
    write_components(folder, principal_components(pixels, sums, products))
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=image_format.features(source.class_names),
    split_infos=splits,
    filename_template=splits[0].filename_template.template,
    check_data=False,
    supervised_keys=('image', 'label'),
    description=f'{source.name.partition(":")[0]}, short side {image_format.side} ({image_format.suffix()}).',
  )
  for path in (*folder.glob('.statistics-*.json'), *folder.glob('.partial-*')):  # of killed processes
    path.unlink()
  return sum(shard['left_out'] for shard in every.values())


def write_shard(
  path: pathlib.Path, statistics: pathlib.Path, reader: Reader, indices: np.ndarray, features: Any, bar: Any
) -> None:
  """Resizes the examples with the given indices and writes them as a TFRecord file.

  The JSON file `statistics` receives the numbers of images and pixels, and sums of pixel values and products.
  Raises OSError if the disk is full or not writable.
  """
  chunks = np.split(indices, range(_CHUNK, len(indices), _CHUNK))
  plans = [Plan(chunk, np.ones(len(chunk), np.float32), np.zeros((len(chunk), 0))) for chunk in chunks]
  images, pixels, sums, products = 0, 0, np.zeros(3), np.zeros((3, 3))
  with atomic_path(path) as partial:
    with partial.open('wb') as file:
      for batch in reader.batches(plans.__getitem__, range(len(plans)), None):
        names = [one.name for one in reader.source.read(batch['index'])]
        kept = np.flatnonzero(batch['weight'])
        for row in kept:
          name = names[row]
          if os.path.isfile(name):  # TFDS's own names are kept
            name = '/'.join(pathlib.PurePath(name).parts[-2:])
          example = {'image': batch['image'][row], 'label': int(batch['label'][row]), 'file_name': name}
          file.write(framed(features.serialize_example(example)))
        images += len(kept)
        pixels += int(batch['pixels'][kept].sum())
        sums += batch['sums'][kept].sum(0)
        products += batch['products'][kept].sum(0)
        bar.update(len(names))
    counts = {'images': images, 'left_out': len(indices) - images, 'pixels': pixels}
    write_text(statistics, json.dumps(counts | {'sums': sums.tolist(), 'products': products.tolist()}))


def _encode(image_format: ImageFormat, images: Sequence[Encoded], _: np.ndarray) -> dict[str, np.ndarray]:
  """Resizes and encodes images; also counts pixels [B], and sums values [B, 3] and products [B, 3, 3]."""
  view = EvalView(image_format.side, image_format.side)
  resize = evaluation_crops if image_format.crop == 'center' else resize_short_side
  contents, values = np.empty(len(images), object), []
  for row, image in enumerate(images):
    pixels = resize(decode_pixels(image), view)
    if max(pixels.shape) > LONGEST:
      size = f'{image.height}x{image.width} would be resized to {max(pixels.shape):,} pixels'
      raise UnreadableError(f'{size}; JPEG allows {LONGEST:,}')
    contents[row] = pixels
    if image_format.encoding == 'jpeg':
      Image.fromarray(pixels).save(buffer := io.BytesIO(), 'JPEG', quality=image_format.quality)
      contents[row] = buffer.getvalue()
    values.append(pixels.reshape(-1, 3).astype(np.float64))
  return {
    'image': contents,
    'pixels': np.array([len(value) for value in values]),
    'sums': np.array([value.sum(0) for value in values]),
    'products': np.array([value.T @ value for value in values]),
  }
