"""Our own weights files: safetensors with our names, and the whole spec inside as JSON."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.surgery import computation
from alexnet_flax.weights.layout import Tensors, check, match_input

FORMAT = 'alexnet_flax'


def read(stored: dict[str, np.ndarray], metadata: dict[str, str], spec: Spec, source: str) -> Tensors:
  """The tensors of our own file, for a spec of the same architecture.

  Raises:
    UsageError: the file is of another architecture, mean or scale; or a tensor does not fit.
  """
  theirs = stored_spec(metadata, source)
  for (name, one), (_, other) in zip(theirs.named_layers(), spec.named_layers(), strict=False):
    if computation(one) != computation(other):
      raise UsageError(f'{source} holds {theirs.name}, not {spec.name}: {name} is {one} there, {other} here')
  if len(theirs.layers) != len(spec.layers):
    raise UsageError(f'{source} holds {theirs.name} of {len(theirs.layers)} layers, not {spec.name}')
  return match_input(check(stored, spec, source), spec, theirs.preprocessing, source)


def write(tensors: Tensors, spec: Spec, path: pathlib.Path, class_names: Sequence[str] = ()) -> None:
  """Writes the tensors, the spec, and the names of the classes where they are known."""
  metadata = {'format': FORMAT, 'variant': spec.name, 'spec': json.dumps(_encode(spec))}
  if class_names:
    metadata['class_names'] = json.dumps(list(class_names))
  path.write_bytes(save(tensors, metadata=metadata))


def stored_class_names(metadata: dict[str, str], source: str) -> tuple[str, ...]:
  """The names inside one of our own files, or none.

  Raises:
    UsageError: they cannot be read.
  """
  try:
    names = json.loads(metadata.get('class_names', '[]'))
  except ValueError:
    names = None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UsageError(f'{source}: its names of classes cannot be read')
  return tuple(names)


def stored_spec(metadata: dict[str, str], source: str) -> Spec:
  """The spec inside one of our own files."""
  try:
    spec = _decode(json.loads(metadata['spec']))
    # A network of these layers is one that JAX can trace at its size: what is damaged shows here.
    model = AlexNet(spec)
    shape = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
    jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), shape)
    if spec.preprocessing.channel_order not in ('RGB', 'BGR') or not spec.preprocessing.center_crop_share > 0:
      raise ValueError('its preprocessing is none')
    return spec
  except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
    raise UsageError(f'{source}: its description of the network cannot be read: {error}') from None


def _encode(value: Any) -> Any:
  """Dataclasses as objects with their class's name under 'class'."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {'class': type(value).__name__, **fields}
  return [_encode(item) for item in value] if isinstance(value, tuple) else value


_CLASSES = {
  one.__name__: one for one in vars(specs).values() if isinstance(one, type) and dataclasses.is_dataclass(one)
}


def _decode(value: Any) -> Any:
  if isinstance(value, dict):
    fields = {key: _decode(item) for key, item in value.items() if key != 'class'}
    return _CLASSES[value['class']](**fields)
  return tuple(map(_decode, value)) if isinstance(value, list) else value
