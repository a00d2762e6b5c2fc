"""`alexnet-flax predict`: the most probable classes of image files."""

import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alexnet_flax.data.images import image_files, views_of_files
from alexnet_flax.errors import UsageError, one_line, shown
from alexnet_flax.files import atomic_path, expanded
from alexnet_flax.pretrained import Classification, PretrainedModel

_LONGEST = 230  # bytes of an image's name that the name of its map or figure, of at most 255, can repeat


class Prediction(NamedTuple):
  """The prediction for one image, or why it cannot be read."""

  file: str
  best: list[Classification]  # the most probable classes; none of an image that cannot be read
  view: np.ndarray | None = None  # uint8 [S, S, 3], the image as the network sees it
  error: str | None = None


def predict(
  network: PretrainedModel, files: Sequence[str], batch_size: int = 32, top: int = 5
) -> Iterator[Prediction]:
  """Predicts the most probable classes of each image, in the order given.

  Args:
    network: The network. It sees the central crop of the images.
    files: Their paths.
    batch_size: Images at a time.
    top: How many classes.
  """
  size = min(batch_size, len(files))  # of every batch, so that the network is compiled once
  blank = np.zeros((network.spec.image_size, network.spec.image_size, 3), np.uint8)
  rest = iter(files)
  for seen in views_of_files(files, network.spec, size):
    views = [blank if isinstance(view, str) else view for view in seen]
    some = not all(isinstance(view, str) for view in seen)
    best = network.classify(views + [blank] * (size - len(views)), top) if some else [[]] * len(views)
    for view, classes, file in zip(seen, best, rest, strict=False):
      yield Prediction(file, [], None, view) if isinstance(view, str) else Prediction(file, classes, view)


def write_predictions(
  network: PretrainedModel, images: Sequence[str], *, as_json: bool = False, saliency: str | None = None
) -> int:
  """Prints the predictions for image files.

  Args:
    network: The network.
    images: Files, folders and patterns, as for `image_files`.
    as_json: One JSON object a line instead of a table.
    saliency: A folder for Grad-CAM images of the most probable class.

  Returns:
    The number of images that could not be read.

  Raises:
    UsageError: There are no images, or the folder cannot be written.
  """
  files = image_files(images)
  maps = output_paths(files, saliency, '-gradcam.png', '--saliency') if saliency else {}
  failed = 0
  bar = tqdm(predict(network, files), total=len(files), unit='image', disable=not sys.stderr.isatty())
  for prediction in bar:
    place = None
    if prediction.error:
      reason = f'cannot read {prediction.file}: {prediction.error}'
      if len(files) == 1 and not as_json:
        raise UsageError(reason)
      failed += 1
      bar.write(one_line(reason), file=sys.stderr)
    elif place := maps.get(prediction.file):
      _write_map(network, prediction, place)
    if as_json:
      bar.write(json.dumps(_as_json(prediction, place)), file=sys.stdout)
    elif not prediction.error:
      bar.write(_table(prediction, place), file=sys.stdout)
  return failed


def _table(prediction: Prediction, place: pathlib.Path | None) -> str:
  lines = [one_line(prediction.file + (f'  ({place})' if place else ''))]
  for _, name, share in prediction.best:
    lines.append(f'  {share:7.2%}  {"█" * round(20 * share):20}  {one_line(name)}')
  return '\n'.join(lines)


def _as_json(prediction: Prediction, place: pathlib.Path | None) -> dict[str, Any]:
  if prediction.error:
    return {'file': shown(prediction.file), 'error': prediction.error}
  best = [{'class': one.label, 'name': one.name, 'probability': one.probability} for one in prediction.best]
  return {'file': shown(prediction.file), 'best': best} | ({'saliency': shown(place)} if place else {})


def output_paths(files: Sequence[str], folder: str, ending: str, option: str) -> dict[str, pathlib.Path]:
  """Makes a folder, and names a file in it for each image; a number tells images of one name apart.

  Raises:
    UsageError: The folder cannot be made or written; `option` says which it is.
  """
  place = expanded(folder)
  try:
    place.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f'cannot write to {option}={folder}: {error.strerror}') from None
  if not os.access(place, os.W_OK):
    raise UsageError(f'cannot write to {option}={folder}: it is not writable')
  places: dict[pathlib.Path, str] = {}
  for file in dict.fromkeys(files):
    stem = pathlib.PurePath(file).stem
    if len(raw := os.fsencode(stem)) > _LONGEST:
      stem = raw[:_LONGEST].decode(errors='ignore')
    names = itertools.chain([stem], (f'{stem}-{count}' for count in itertools.count(2)))
    paths = (place / f'{name}{ending}' for name in names)
    places[next(path for path in paths if path not in places)] = file
  return {file: path for path, file in places.items()}


def _write_map(network: PretrainedModel, prediction: Prediction, place: pathlib.Path) -> None:
  from alexnet_flax.inference.grad_cam import drawing, grad_cam

  assert prediction.view is not None
  best = prediction.best[0]
  (heat,) = grad_cam(network.model, network.variables, prediction.view[None], np.array([best.label]))
  try:
    with atomic_path(place) as partial:
      drawing(prediction.view, heat, f'{one_line(best.name)}  {best.probability:.1%}').save(partial)
  except OSError as error:
    raise UsageError(f'cannot write {place}: {error.strerror or error}') from None
