"""Keras 3's files of a sequential network: `.weights.h5`, and `.keras` with the network's description.

Keras stores layers by the name of their class, numbered in their order, and their variables by number:
layers/conv2d_1/vars/0. Kernels are laid out as ours.
"""

import io
import json
import pathlib
import re
import zipfile
import zlib
from collections import Counter
from typing import Any, BinaryIO

import h5py
import numpy as np

from alexnet_flax import specs
from alexnet_flax.errors import UsageError
from alexnet_flax.naming import head_name, named_layers
from alexnet_flax.specs import Preprocessing, Spec
from alexnet_flax.weights.keras_network import keras_config, steps
from alexnet_flax.weights.layout import Tensors, check, match_input, pick, reversed_colours

_CLASSES: dict[type, str] = {
  specs.Conv: 'Conv2D',
  specs.Dense: 'Dense',
  specs.BatchNorm: 'BatchNormalization',
}
_LEAVES = {
  'Conv2D': ('params/{}/kernel', 'params/{}/bias'),
  'Dense': ('params/{}/kernel', 'params/{}/bias'),
  'BatchNormalization': ('params/{}/scale', 'params/{}/bias', 'batch_stats/{}/mean', 'batch_stats/{}/var'),
}
# What zipfile raises of a damaged archive; the third of passwords and unknown ways of compression.
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)
_WEIGHTS = 'model.weights.h5'  # inside a .keras archive


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> Keras's paths."""
  names, counts = {}, Counter[str]()
  for name, layer in named_layers(spec):
    kind = _CLASSES.get(type(layer))
    if kind is None:
      continue
    snake = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', kind).lower()
    stored = f'{snake}_{counts[snake]}' if counts[snake] else snake
    counts[snake] += 1
    for number, leaf in enumerate(_LEAVES[kind]):
      names[leaf.format(name)] = f'layers/{stored}/vars/{number}'
  return names


def read(content: bytes, spec: Spec, source: str) -> Tensors:
  """The tensors of a `.weights.h5` or `.keras` file.

  Neither says how pictures were preprocessed. We take them to have been in RGB, as the spec says; a
  `.keras` network with preprocessing layers is refused.

  Raises:
    UsageError: the file is broken or of another network, or a tensor does not fit.
  """
  if zipfile.is_zipfile(io.BytesIO(content)):
    content = _from_archive(content, spec, source)
  try:
    stored = _stored(io.BytesIO(content))
  except (OSError, KeyError, ValueError, RuntimeError) as error:
    raise UsageError(f'{source}: broken: {" ".join(str(error).split())[:200]}') from None
  names = tensor_names(spec)
  tensors = check(pick(stored, names, source), spec, source, names)
  return match_input(tensors, spec, _rgb(spec), source)


def write(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes `.weights.h5`, for `model.load_weights` of a Keras network with the spec's layers.

  Raises:
    UsageError: Keras has no such layer.
  """
  keras_config(spec, 1)  # refuses what Keras has no layer for
  with path.open('wb') as file:
    _write_weights(tensors, spec, file)


def write_keras(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes `.keras`, for `keras.models.load_model`; it ends in logits, not in a softmax."""
  classes = tensors[f'params/{head_name(spec)}/bias'].shape[0]
  weights = io.BytesIO()
  _write_weights(tensors, spec, weights)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('metadata.json', json.dumps({'keras_version': '3.0.0'}))
    archive.writestr('config.json', json.dumps(keras_config(spec, classes)))
    archive.writestr(_WEIGHTS, weights.getvalue())


def _rgb(spec: Spec) -> Preprocessing:
  ours = spec.preprocessing
  return ours if ours.channel_order == 'RGB' else reversed_colours(ours)


def _stored(file: BinaryIO) -> dict[str, np.ndarray]:
  stored = {}

  def visit(path: str, item: Any) -> None:
    if isinstance(item, h5py.Dataset) and not path.startswith(('optimizer/', 'metrics/')):
      stored[path.removeprefix('_layer_checkpoint_dependencies/')] = item[()]

  with h5py.File(file, 'r') as archive:
    archive.visititems(visit)
  return stored


def _write_weights(tensors: Tensors, spec: Spec, file: BinaryIO) -> None:
  tensors = match_input(tensors, spec, _rgb(spec), "Keras's layout")
  with h5py.File(file, 'w') as archive:
    for ours, theirs in tensor_names(spec).items():
      archive[theirs] = tensors[ours]


def _from_archive(content: bytes, spec: Spec, source: str) -> bytes:
  """The weights of a .keras archive whose network has the spec's layers in their order."""
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      config = json.loads(archive.read('config.json'))
      weights = archive.read(_WEIGHTS)
    theirs = steps(config)
  except (KeyError, ValueError, TypeError, AttributeError, EOFError, *_BROKEN_ARCHIVE) as error:
    raise UsageError(f'{source}: broken, or not a Keras network of layers in a row: {error}') from None
  ours = steps(keras_config(spec, 1))
  for (name, *step), (our_name, *our_step) in zip(theirs, ours, strict=False):
    if step != our_step:
      raise UsageError(
        f'{source} is of another network than {spec.name}: its layer {name} is {_text(step)}, where'
        f' {our_name} must be {_text(our_step)}'
      )
  if len(theirs) != len(ours):
    raise UsageError(f'{source} has {len(theirs)} computing layers, {spec.name} has {len(ours)}')
  return weights


def _text(step: list[Any]) -> str:
  return ' '.join([step[0], *(f'{key}={value}' for key, value in step[1].items())])
