"""`alexnet-flax prepare NAME --side 256`: rewrites a data set with smaller images, which decode much faster.

The result is a TFDS data set with its own name and version, in TFRecord files. Each file (a shard) is written
atomically, and the metadata that TFDS looks for comes last. An interrupted run therefore continues with the
next shard, and an incomplete data set is never visible.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from alexnet_flax.data.bad_images import BadImages, Policy
from alexnet_flax.data.prepare.color_pca import principal_components, write_components
from alexnet_flax.data.prepare.shards import ImageFormat, write_shard
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import IMAGE_FOLDER, open_dataset, split_names
from alexnet_flax.errors import UsageError
from alexnet_flax.files import write_text

VERSION = '1.0.0'
_SHARD_BYTES = 256 << 20
_PLAN = 'prepared_from.json'  # source and options; a run only continues with the same ones
_LOCK = '.lock'


def prepare_smaller(
  name: str,
  image_format: ImageFormat,
  *,
  data_dir: str | None = None,
  out_dir: str | None = None,
  on_bad_image: Policy = 'error',
) -> str:
  """Rewrites a data set with resized images; labels, class names and file names are kept.

  It also computes the principal components of the colours of the split 'train', for `augment.py`.

  Args:
    name: The name of a prepared TFDS data set, or 'image_folder'.
    image_format: The size and encoding of the new images.
    data_dir: The folder of the data set.
    out_dir: The folder to write to; `data_dir` if None, or TFDS's default folder for an 'image_folder'.
    on_bad_image: 'skip' leaves out images that cannot be decoded.

  Returns:
    The new data set's name.

  Raises:
    UsageError: The data set is not prepared, an image cannot be decoded, or the disk is full.
  """
  is_folder = name == IMAGE_FOLDER
  base = pathlib.Path(data_dir or '').resolve().name if is_folder else name.partition(':')[0]
  new_name = re.sub(r'\W+', '_', f'{base}_{image_format.suffix()}').lower()
  if not new_name[0].isalpha():  # TFDS requires a letter
    new_name = f'd_{new_name}'
  root = out_dir or (None if is_folder else data_dir)
  folder = pathlib.Path(root or tfds.core.constants.DATA_DIR).expanduser() / new_name / VERSION
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
      with tqdm(total=total, unit='image', desc=new_name) as bar:
        splits = [
          _write_split(folder, new_name, split, source, image_format, bad, bar)
          for split, source in sources.items()
        ]
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

  Raises:
    UsageError: It contains another finished plan.
  """
  path, plan = folder / _PLAN, json.loads(json.dumps(plan))
  found = json.loads(path.read_text()) if path.exists() else None
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


def _write_split(
  folder: pathlib.Path,
  name: str,
  split: str,
  source: Source,
  image_format: ImageFormat,
  bad: BadImages,
  bar: tqdm,
) -> Any:
  size = image_format.side**2 * 4  # three channels, with a long side of about 4 / 3 of the short side
  per_shard = max(_SHARD_BYTES // (size if image_format.encoding == 'raw' else size // 8), 1)
  count = -(-source.num_examples // per_shard)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=name, split=split, filetype_suffix='tfrecord'
  )
  lengths, written = [], 0
  for shard in range(count):
    path = pathlib.Path(template.sharded_filepath(shard_index=shard, num_shards=count))
    statistics = folder / f'.statistics-{split}-{shard:05d}.json'
    indices = np.arange(shard * per_shard, min((shard + 1) * per_shard, source.num_examples))
    if not (path.exists() and statistics.exists()):
      write_shard(path, statistics, source, indices, image_format, bad, bar)
    else:
      bar.update(len(indices))
    lengths.append(json.loads(statistics.read_text())['images'])
    written += path.stat().st_size
  return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=written, filename_template=template)


def _write_metadata(
  folder: pathlib.Path, image_format: ImageFormat, source: Source, splits: Sequence[Any]
) -> int:
  """Writes the colour components and then TFDS's metadata; returns the number of skipped images."""
  every = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob('.statistics-*.json'))}
  train = [shard for name, shard in every.items() if name.startswith('.statistics-train-')]
  if train:
    pixels = sum(shard['pixels'] for shard in train)
    sums, products = (np.sum([shard[key] for shard in train], axis=0) for key in ('sums', 'products'))
    write_components(folder, principal_components(pixels, sums, products))
  side = image_format.side if image_format.crop == 'center' else None
  if image_format.encoding == 'jpeg':
    image: Any = tfds.features.Image(shape=(side, side, 3), encoding_format='jpeg')
  else:
    bytes_encoding = tfds.features.Encoding.BYTES
    image = tfds.features.Tensor(shape=(side, side, 3), dtype=np.uint8, encoding=bytes_encoding)
  features = {
    'image': image,
    'label': tfds.features.ClassLabel(names=list(source.class_names)),
    'file_name': tfds.features.Text(),
  }
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=tfds.features.FeaturesDict(features),
    split_infos=splits,
    filename_template=splits[0].filename_template.template,
    check_data=False,
    supervised_keys=('image', 'label'),
    description=f'{source.name.partition(":")[0]}, short side {image_format.side} ({image_format.suffix()}).',
  )
  for path in (*folder.glob('.statistics-*.json'), *folder.glob('.partial-*')):  # of killed processes
    path.unlink()
  return sum(shard['left_out'] for shard in every.values())
