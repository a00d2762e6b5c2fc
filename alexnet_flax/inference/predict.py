"""`alexnet-flax predict`: what is in image files."""

import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from PIL import Image
from tqdm import tqdm

from alexnet_flax.data.images import image_files, views_of_files
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.pretrained import Trained

TOP = 5


class Answer(NamedTuple):
  """A class, its name, and its probability."""

  number: int
  name: str
  probability: float


class Prediction(NamedTuple):
  """What a network says of one image.

  Attributes:
    file: its path.
    best: the most probable classes, most probable first.
    view: uint8 [S, S, 3], what the network saw.
    error: why the image cannot be read, or None; there is nothing else then.
  """

  file: str
  best: list[Answer]
  view: np.ndarray | None = None
  error: str | None = None


def best_answers(logits: np.ndarray, names: Sequence[str]) -> list[Answer]:
  """The five most probable classes by their logits, float [C]."""
  probabilities = scipy.special.softmax(logits.astype(np.float64))
  best = np.argsort(-probabilities, kind='stable')[:TOP].tolist()
  return [Answer(number, names[number], float(probabilities[number])) for number in best]


def predict(network: Trained, files: Sequence[str], batch_size: int = 32) -> Iterator[Prediction]:
  """The five most probable classes of each image, in the order given.

  Args:
    network: whose view of the images is the central crop.
    files: paths. Those that cannot be read are told with their reason.
    batch_size: images at a time.
  """
  head = network.spec.head
  rest = iter(files)
  for seen in views_of_files(files, network.spec, batch_size):
    views = [view for view in seen if not isinstance(view, str)]
    batches = feature_batches(network.model, network.variables, views, [head], batch_size=batch_size)
    logits = iter([row for batch in batches for row in batch[head]])
    for view in seen:
      if isinstance(view, str):
        yield Prediction(next(rest), [], error=view)
      else:
        yield Prediction(next(rest), best_answers(next(logits), network.readable_names), view)


def write_predictions(
  network: Trained, images: Sequence[str], *, as_json: bool = False, saliency: str | None = None
) -> int:
  """Prints the predictions for image files.

  Args:
    network: the network.
    images: files, folders and patterns, as for `image_files`.
    as_json: one JSON object a line instead of a table.
    saliency: a folder for Grad-CAM images of the most probable class, if given.

  Returns:
    How many images could not be read.

  Raises:
    UsageError: there are no images, or the folder cannot be written.
  """
  files = image_files(images)
  maps = _names_of_maps(files, saliency) if saliency else {}
  failed = 0
  bar = tqdm(predict(network, files), total=len(files), unit='image', disable=not sys.stderr.isatty())
  for prediction in bar:
    place = None
    if prediction.error:
      reason = f'cannot read {prediction.file}: {prediction.error}'
      if len(files) == 1 and not as_json:
        raise UsageError(reason)
      failed += 1
      bar.write(reason, file=sys.stderr)
    elif place := maps.get(prediction.file):
      _write_map(network, prediction, place)
    if as_json:
      bar.write(json.dumps(_as_json(prediction, place)), file=sys.stdout)
    elif not prediction.error:
      bar.write(_table(prediction, place), file=sys.stdout)
  return failed


def _table(prediction: Prediction, place: pathlib.Path | None) -> str:
  lines = [prediction.file + (f'  ({place})' if place else '')]
  for _, name, probability in prediction.best:
    lines.append(f'  {probability:7.2%}  {"█" * round(20 * probability):20}  {name}')
  return '\n'.join(lines)


def _as_json(prediction: Prediction, place: pathlib.Path | None) -> dict[str, Any]:
  if prediction.error:
    return {'file': prediction.file, 'error': prediction.error}
  best = [
    {'class': number, 'name': name, 'probability': probability}
    for number, name, probability in prediction.best
  ]
  return {'file': prediction.file, 'best': best} | ({'saliency': str(place)} if place else {})


def _names_of_maps(files: Sequence[str], folder: str) -> dict[str, pathlib.Path]:
  """A name for the map of each image; of images of the same name in several folders, different ones."""
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f'cannot write to --saliency={folder}: {error.strerror}') from None
  places: dict[str, pathlib.Path] = {}
  taken: set[str] = set()
  for file in dict.fromkeys(files):
    stem = pathlib.PurePath(file).stem
    names = itertools.chain([stem], (f'{stem}-{count}' for count in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    places[file] = pathlib.Path(folder) / f'{name}-gradcam.png'
  return places


def _write_map(network: Trained, prediction: Prediction, place: pathlib.Path) -> None:
  from alexnet_flax.inference.grad_cam import grad_cam, overlay

  assert prediction.view is not None
  heat = grad_cam(
    network.model, network.variables, prediction.view[None], np.array([prediction.best[0].number])
  )
  try:
    Image.fromarray(np.hstack([prediction.view, overlay(prediction.view, heat[0])])).save(place)
  except OSError as error:
    raise UsageError(f'cannot write {place}: {error.strerror or error}') from None
