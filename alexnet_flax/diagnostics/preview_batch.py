"""`train.py --show_batch=out.png`: draws the network's input in the first step, beside the stored images."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from alexnet_flax.config import Config
from alexnet_flax.data import sampling
from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.data.images import UnreadableError, caption_font, evaluation_crops
from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import atomic_path, expanded
from alexnet_flax.models.spec import Preprocessing
from alexnet_flax.steps import Batch, Preprocess, micro_batches
from alexnet_flax.training.batches import train_batches
from alexnet_flax.training.experiment import build_experiment

_MOST = 16
_SIDE = 160  # of a tile, in pixels
_GAP, _MARGIN = 6, 56  # between tiles; left of them, for the names of the rows
_TEXT = 36  # two lines


def show_batch(config: Config, path: str) -> None:
  """Draws the first images of a run's first step, before and after cropping and augmentation.

  Raises:
    UsageError: The file cannot be written, or the run could not start.
  """
  experiment = build_experiment(config)
  if experiment.learner.preprocess is None:
    raise UsageError('a linear probe trains on features; there are no images to show')
  config, source, size = experiment.config, experiment.data.train, experiment.spec.image_size
  batch = next(train_batches(experiment, 0))
  # The key of the first step, as the training loop and `train_step` derive it.
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), 0)
  seen = seen_in_step(experiment.learner.preprocess, batch, key, config.optimizer.accumulate_steps)
  after = _as_bytes(np.asarray(seen['image'][:_MOST]), experiment.spec.preprocessing)
  chosen = sampling.batch_indices(config.seed, 0, config.data.batch_size, source.num_examples)[:_MOST]
  before = []
  for example in source.read(chosen):
    try:
      pixels = decode_pixels(example.image, max_pixels=config.data.max_pixels)
      before.append(evaluation_crops(pixels, EvalView(size, size)))
    except UnreadableError:  # skipped, as configured; otherwise `train_batches` would have raised an error
      before.append(np.full((size, size, 3), 128, np.uint8))
  names = [_label(label, source.class_names) for label in np.asarray(seen['label'][:_MOST])]
  try:
    with atomic_path(expanded(path)) as partial:
      _sheet(before, list(after), names).save(partial)
  except (OSError, ValueError) as error:
    raise UsageError(f'cannot write --show_batch={path}: {error}') from None
  print(f"{path}: {len(names)} images of step 1, above as stored, below as the network's input")


def seen_in_step(preprocess: Preprocess, batch: Batch, key: jax.Array, accumulate_steps: int = 1) -> Batch:
  """Returns the network's input in a `train_step` with this batch and key, in the batch's order."""

  def seen(part: tuple[Batch, jax.Array]) -> Batch:
    images, part_key = part
    return preprocess(images, jax.random.split(part_key)[0])  # the other half is for dropout

  parts = jax.lax.map(seen, micro_batches(batch, key, accumulate_steps))
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def _as_bytes(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """Converts the network's input back to RGB, uint8 [B, S, S, 3]."""
  pixels = (images * np.array(preprocessing.std) + np.array(preprocessing.mean)) / preprocessing.scale
  if preprocessing.channel_order == 'BGR':
    pixels = pixels[..., ::-1]
  return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def _label(label: np.ndarray, names: tuple[str, ...]) -> str:
  """Returns the name of a class, or the names and shares of mixed classes."""
  names = tuple(map(one_line, names))
  if label.ndim == 0:
    return names[int(label)]
  mixed = sorted(((share, names[number]) for number, share in enumerate(label) if share > 0), reverse=True)
  return '\n'.join(f'{share:.2f} {name}' if share < 1 else name for share, name in mixed[:2])


def _sheet(before: list[np.ndarray], after: list[np.ndarray], labels: list[str]) -> Image.Image:
  """Draws rows of up to eight pairs, each above its label; the rows' names stand on the left."""
  columns = min(8, len(labels))
  height = 2 * (_SIDE + _GAP) + _TEXT
  width, rows = _MARGIN + columns * (_SIDE + 2 * _GAP), -(-len(labels) // columns)
  sheet = Image.new('RGB', (width, rows * height + _GAP), 'white')
  draw, font = ImageDraw.Draw(sheet), caption_font(12)
  for number, (first, second, label) in enumerate(zip(before, after, labels, strict=True)):
    left = _MARGIN + number % columns * (_SIDE + 2 * _GAP)
    top = _GAP + number // columns * height
    for name, image, y in (('stored', first, top), ('input', second, top + _SIDE + _GAP)):
      tile = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
      sheet.paste(tile, (left, y))
      if number % columns == 0:
        draw.text((_GAP, y + _SIDE // 2 - 8), name, 'black', font)
    for line, text in enumerate(label.splitlines()):
      while font.getlength(text) > _SIDE:
        text = text[:-2].rstrip('…') + '…'
      draw.text((left, top + 2 * _SIDE + _GAP + 3 + 15 * line), text, 'black', font)
  return sheet
