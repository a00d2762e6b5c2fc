"""`alexnet-flax prepare NAME --side 256`: a data set with smaller images, which decode in a fraction.

The result is a TFDS data set of its own name and version in TFRecord files. Each file (a shard) is
written beside its place and then moved there, and the data set's description, by which TFDS finds it,
comes last: a run that was killed goes on at the shard at which it was, and nobody sees half a data set.
"""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from alexnet_flax.data.bad_images import BadImages, Policy
from alexnet_flax.data.prepare.color_pca import principal_components, write_components
from alexnet_flax.data.prepare.shards import Form, write_shard, write_whole
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import IMAGE_FOLDER, open_dataset, split_names
from alexnet_flax.errors import UsageError

VERSION = '1.0.0'
_SHARD_BYTES = 256 << 20
_PLAN = 'prepared_from.json'  # which images, and how: a run that goes on must go on with the same


def prepare_smaller(
  name: str,
  form: Form,
  *,
  data_dir: str | None = None,
  out_dir: str | None = None,
  on_bad_image: Policy = 'error',
) -> str:
  """Writes a data set anew with its images resized; labels, class names and file names stay.

  The principal components of its colours are computed on the way from the split 'train', for the colour
  noise of `augment.py`.

  Args:
    name: of a prepared TFDS data set, or 'image_folder'.
    form: of the images.
    data_dir: where that lies.
    out_dir: where to write; `data_dir` if None, or TFDS's own folder for an 'image_folder'.
    on_bad_image: 'skip' leaves out what cannot be decoded.

  Returns:
    The new data set's name.

  Raises:
    UsageError: the data set is not prepared, an image cannot be decoded, or the disk is full.
  """
  is_folder = name == IMAGE_FOLDER
  base = pathlib.Path(data_dir or '').resolve().name if is_folder else name.partition(':')[0]
  new_name = re.sub(r'\W+', '_', f'{base}_{form.suffix()}').lower()
  if not new_name[0].isalpha():  # TFDS finds no other
    new_name = f'd_{new_name}'
  root = out_dir or (None if is_folder else data_dir)
  folder = pathlib.Path(root or tfds.core.constants.DATA_DIR).expanduser() / new_name / VERSION
  bad = BadImages(on_bad_image, lambda line: tqdm.write(line), '--on_bad_image=skip')
  sources = {split: open_dataset(name, split, data_dir) for split in split_names(name, data_dir)}
  plan = {
    'splits': {split: [source.identity, source.num_examples] for split, source in sources.items()},
    'form': dataclasses.asdict(form),
    'on_bad_image': on_bad_image,
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
      if _is_done(folder, plan):
        print(f'{new_name} is in {folder} already')
        return new_name
      total = sum(source.num_examples for source in sources.values())
      with tqdm(total=total, unit='image', desc=new_name) as bar:
        splits = [
          _write_split(folder, new_name, split, source, form, bad, bar) for split, source in sources.items()
        ]
      left_out = _write_description(folder, form, next(iter(sources.values())), splits)
  except OSError as error:
    raise UsageError(f'cannot write {folder}: {error.strerror or error}; what is written stays') from None
  counts = ', '.join(f'{info.name} ({info.num_examples:,})' for info in splits)
  print(f'{new_name} is in {folder}: {counts}')
  if left_out:
    print(f'{left_out} images cannot be decoded and were left out')
  return new_name


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
  with (folder / '.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UsageError(f'another process is writing {folder}; wait for it') from None
    yield


def _is_done(folder: pathlib.Path, plan: dict[str, Any]) -> bool:
  """Whether the folder holds the whole of a plan; if it holds parts of another, they are removed.

  Raises:
    UsageError: it holds the whole of another.
  """
  path, plan = folder / _PLAN, json.loads(json.dumps(plan))
  found = json.loads(path.read_text()) if path.exists() else None
  if (folder / 'dataset_info.json').exists():
    if found != plan:
      raise UsageError(f'{folder} was made of other images; remove it, or give another --out_dir')
    return True
  if found != plan:
    for old in folder.iterdir():
      if old.name != '.lock':
        old.unlink()
    write_whole(path, json.dumps(plan))
  return False


def _write_split(
  folder: pathlib.Path, name: str, split: str, source: Source, form: Form, bad: BadImages, bar: tqdm
) -> Any:
  size = form.side * form.side * 4  # the long side is some 4 / 3 of the short one
  per_shard = max(_SHARD_BYTES // (size if form.encoding == 'raw' else size // 8), 1)
  count = -(-source.num_examples // per_shard)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=name, split=split, filetype_suffix='tfrecord'
  )
  lengths, written = [], 0
  for shard in range(count):
    path = pathlib.Path(template.sharded_filepath(shard_index=shard, num_shards=count))
    noted = _statistics_path(folder, split, shard)
    numbers = np.arange(shard * per_shard, min((shard + 1) * per_shard, source.num_examples))
    if not (path.exists() and noted.exists()):
      write_shard(path, noted, source, numbers, form, bad, bar)
    else:
      bar.update(len(numbers))
    lengths.append(json.loads(noted.read_text())['images'])
    written += path.stat().st_size
  return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=written, filename_template=template)


def _write_description(folder: pathlib.Path, form: Form, source: Source, splits: Sequence[Any]) -> int:
  """The statistics, and the files by which TFDS finds the data set, last of all.

  Returns:
    How many images were left out.
  """
  every = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob('.statistics-*.json'))}
  notes = [note for name, note in every.items() if name.startswith('.statistics-train-')]
  if notes:
    pixels = sum(note['pixels'] for note in notes)
    sums, products = (np.sum([note[key] for note in notes], axis=0) for key in ('sums', 'products'))
    write_components(folder, principal_components(pixels, sums, products))
  side = form.side if form.crop == 'center' else None
  if form.encoding == 'jpeg':
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
    description=f'{source.name.partition(":")[0]}, short side {form.side} pixels ({form.suffix()}).',
  )
  for path in (*folder.glob('.statistics-*.json'), *folder.glob('partial-*')):
    path.unlink()
  return sum(note['left_out'] for note in every.values())


def _statistics_path(folder: pathlib.Path, split: str, shard: int) -> pathlib.Path:
  return folder / f'.statistics-{split}-{shard:05d}.json'
