"""`alexnet-flax units`: a page of what each unit likes, as HTML or PNG."""

import glob
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from alexnet_flax.data import images as files
from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.evaluation.protocols import open_evaluated
from alexnet_flax.files import atomic_path, expanded, write_text
from alexnet_flax.inference.units import TopImage, maximize, output_shape, peaks, top_images
from alexnet_flax.models.receptive_field import receptive_fields
from alexnet_flax.models.spec import Spec
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.viz.figures import data_uri, page_template

_SIDE, _GAP, _LINE = 128, 6, 20  # pixels: an image of a data set, between images, a line of text
_KEY = 'a number is the greatest activation of all places; the first image was made for the unit'
_ACROSS = 4  # units in a row of a PNG without images of a data set

Images = tuple[str, int, Iterator[tuple[str, np.ndarray | str]]]


def open_images(place: str, spec: Spec, data_dir: str | None = None) -> Images:
  """Opens a folder, file or pattern of images, or a data set NAME[:SPLIT]; UsageError if there is none.

  Returns its name, the number of images, and their names and views, uint8 [S, S, 3], or why it has none.
  """
  if os.path.exists(expanded(place)) or any(sign in place for sign in '*?') or glob.glob(place):
    paths = files.image_files([place])
    views = (view for batch in files.views_of_files(paths, spec, 64) for view in batch)
    # From the folder that all have in common: the page names no folder of the user.
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [files.printable(os.path.relpath(path, root)) for path in paths]
    return os.path.basename(place.rstrip('/')), len(paths), zip(names, views, strict=True)
  try:
    source = open_evaluated(place, data_dir)
  except UsageError as error:
    raise UsageError(f'--images {place} is no file or folder, and as a data set: {error}') from None

  def examples() -> Iterator[tuple[str, np.ndarray | str]]:
    for index in range(source.num_examples):
      (example,) = source.read(np.array([index]))
      name = f'{source.class_names[example.label]}, ' if example.label >= 0 else ''
      try:
        pixels = decode_pixels(example.image, turn=not source.is_published)
        yield f'{name}image {index}', files.evaluation_view(pixels, spec)
      except files.UnreadableError as error:
        yield example.name or f'image {index}', str(error)

  return source.name, source.num_examples, examples()


def write_units(
  network: PretrainedModel,
  layer: str,
  units: Sequence[int],
  path: pathlib.Path,
  images: Images | None = None,
  top: int = 8,
  **options: Any,
) -> int:
  """Writes a page: for each unit an image made for it, and the `top` images, framed where the unit peaks.

  `path` ends in .html or .png; `options` are those of `maximize`. Returns how many images could not be read.
  Raises UsageError if that is all of them, or the page cannot be written.
  """
  shape, field, unreadable = output_shape(network, layer), receptive_fields(network.spec)[layer], 0
  made = maximize(network, layer, units, **options)
  one_at_a_time = ((np.array([unit]), image[None]) for unit, image in zip(units, made, strict=True))
  values = [peaks(network.model, network.variables, layer, *one)[0].item() for one in one_at_a_time]
  sees = f'{field.size}x{field.size} pixels with padding'
  sees += f', the first from {field.offset} and then every {field.stride}' if field.stride else ''
  name = f'{layer} of {pathlib.PurePath(network.source).name} ({network.spec.name})'
  facts = [f'{name}, {"x".join(map(str, shape))}; a unit sees {sees}']
  found: list[list[TopImage]] = [[] for _ in units]
  if images:
    name, total, stream = images

    def readable() -> Iterator[tuple[str, np.ndarray]]:
      nonlocal unreadable
      for name, view in tqdm(stream, total=total, unit='image', disable=not sys.stderr.isatty()):
        if not isinstance(view, str):
          yield name, view
          continue
        unreadable += 1
        print(one_line(f'cannot read {name}: {view}'), file=sys.stderr)

    found = top_images(network, layer, units, readable(), top)
    if unreadable == total:
      raise UsageError(f'none of the {total} images of {name} can be read')
    facts.append(f'beside each, those of {total - unreadable:,} images of {name} that activate it most')
  is_head = layer == network.spec.head
  names = [network.readable_names[unit] if is_head else f'unit {unit}' for unit in units]
  drawn = [[(one, *_draw(one, field.spans)) for one in row] for row in found]
  rows = list(zip(names, made, values, drawn, strict=True))
  try:
    if path.suffix.lower() == '.png':
      with atomic_path(path) as partial:
        _sheet(rows, [*facts, _KEY]).save(partial, 'PNG')
    else:
      write_text(path, page_template('units.html').render(rows=rows, facts=facts, uri=data_uri))
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
  return unreadable


def _draw(one: TopImage, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns an image with a frame around what the unit sees, and that alone on grey; both of one size."""
  (top, bottom), (left, right) = spans[one.row], spans[one.column]
  whole, part = _scaled(one.view), _scaled(one.view[top:bottom, left:right])
  x, y, x_end, y_end = (round(edge * _SIDE / len(one.view)) for edge in (left, top, right, bottom))
  ImageDraw.Draw(whole).rectangle((x, y, x_end - 1, y_end - 1), outline='#ff5a1f', width=2)
  around = Image.new('RGB', (_SIDE, _SIDE), '#808080')
  around.paste(part, ((_SIDE - part.width) // 2, (_SIDE - part.height) // 2))
  return np.asarray(whole), np.asarray(around)


def _scaled(image: np.ndarray, side: int = _SIDE) -> Image.Image:
  """Scales an image, uint8 [H, W, 3], to a longer side of `side`."""
  longer = max(image.shape[:2])
  height, width = (max(side * length // longer, 1) for length in image.shape[:2])
  method = Image.Resampling.BICUBIC if longer > side // 2 else Image.Resampling.NEAREST
  return Image.fromarray(image).resize((width, height), method)


def _sheet(rows: Sequence[Any], facts: Sequence[str]) -> Image.Image:
  """Draws a row for each unit; where there are no images of a data set, several units in a row."""
  font, step, (*_, first) = files.caption_font(13), _SIDE + _GAP, rows[0]
  across = 1 if first else min(_ACROSS, len(rows))
  width, height, head = (2 + len(first)) * step, 2 * step + _LINE, _GAP + len(facts) * _LINE
  longest = max(across * width, *(int(font.getlength(one_line(fact))) for fact in facts))
  sheet = Image.new('RGB', (longest + 2 * _GAP, head + -(-len(rows) // across) * height), 'white')
  texts = [(_GAP, _GAP + number * _LINE, fact) for number, fact in enumerate(facts)]
  for number, (name, image, value, drawn) in enumerate(rows):
    x, y = _GAP + number % across * width, head + number // across * height
    texts += [(x, y, f'{name}: {value:.3g}')]
    sheet.paste(_scaled(image, 2 * _SIDE + _GAP), (x, y + _LINE))
    for left, (one, whole, part) in enumerate(drawn, start=2):
      texts += [(x + left * step, y, f'{one.activation:.3g}')]
      sheet.paste(Image.fromarray(whole), (x + left * step, y + _LINE))
      sheet.paste(Image.fromarray(part), (x + left * step, y + _LINE + step))
  for left, top, text in texts:
    ImageDraw.Draw(sheet).text((left, top), one_line(text), 'black', font)
  return sheet
