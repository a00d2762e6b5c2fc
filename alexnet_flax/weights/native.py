"""Our own weights files: safetensors with our names, and the whole spec inside as JSON."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from alexnet_flax.errors import UsageError
from alexnet_flax.models import spec as specs
from alexnet_flax.models.spec import Layer, Spec
from alexnet_flax.models.surgery import computation
from alexnet_flax.weights.format import Format, Parsed, WeightsFile
from alexnet_flax.weights.layout import Tensors, check, match_input, variable_shapes

NAME = 'alexnet_flax'  # in the file's metadata
_TYPES: dict[str, Any] = {
  'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': jnp.bfloat16, 'I64': '<i8', 'I32': '<i4', 'I16': '<i2',
  'I8': 'i1', 'U8': 'u1', 'BOOL': '?',
}  # fmt: skip


def parse(content: bytes) -> Parsed:
  """The tensors, the spec and the class names of our own file."""
  metadata = _metadata(content)
  spec = _spec(metadata)
  return Parsed(parse_safetensors(content), spec, _class_names(metadata), describe(spec))


def describe(spec: Spec) -> list[tuple[str, Layer]]:
  """The layers without what concerns training only."""
  return [(name, computation(layer)) for name, layer in spec.named_layers()]


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors, which have our names and layout."""
  assert file.spec is not None
  return match_input(check(file.stored, spec, str(file.path)), spec, file.spec.preprocessing, str(file.path))


def dump(tensors: Tensors, spec: Spec, class_names: Sequence[str]) -> bytes:
  """A file of the tensors, the spec, and the class names if they are known."""
  metadata = {'format': NAME, 'variant': spec.name, 'spec': json.dumps(_encode(spec))}
  if class_names:
    metadata['class_names'] = json.dumps(list(class_names))
  return safetensors.numpy.save(tensors, metadata=metadata)


def is_safetensors(content: bytes) -> bool:
  """Whether a file begins as safetensors do: eight bytes of length, then a JSON object."""
  return content[8:9] == b'{'


def parse_safetensors(content: bytes) -> Tensors:
  """The arrays of any safetensors file, by its own names; bfloat16 as float32.

  Raises UsageError for a type that NumPy lacks, and the library's errors if the file is broken.
  """
  arrays = {}
  for name, stored in safetensors.deserialize(content):
    kind = stored['dtype']
    if kind not in _TYPES:
      raise UsageError(f'tensor {name} holds {kind}; save it as float32')
    array = np.frombuffer(stored['data'], _TYPES[kind]).reshape(stored['shape'])
    arrays[name] = array.astype(np.float32) if kind == 'BF16' else array
  return arrays


def _metadata(content: bytes) -> dict[str, str]:
  """The text that a safetensors file holds beside its tensors; none of a broken one."""
  try:
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])['__metadata__']
  except (ValueError, LookupError, TypeError, RecursionError):
    return {}
  return metadata if isinstance(metadata, dict) else {}


def _class_names(metadata: dict[str, str]) -> tuple[str, ...]:
  with contextlib.suppress(ValueError, RecursionError):
    names = json.loads(metadata.get('class_names', '[]'))
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
      return tuple(names)
  raise UsageError('its class names cannot be read')


def _spec(metadata: dict[str, str]) -> Spec:
  try:
    spec = _decode(json.loads(metadata['spec']))
    variable_shapes(spec)  # JAX can trace a valid network at its image size, so damage shows here
    if not (spec.name.isprintable() and spec.source.isprintable()):
      raise ValueError('unprintable names')
    taken = spec.preprocessing
    if taken.channel_order not in ('RGB', 'BGR') or not 0.01 <= taken.center_crop_share < math.inf:
      raise ValueError('invalid preprocessing')
    numbers = (taken.scale, *taken.mean, *taken.std)
    if [len(taken.mean), len(taken.std)] != [3, 3] or not all(map(math.isfinite, numbers)):
      raise ValueError('invalid preprocessing')
    if 0 in (taken.scale, *taken.std):
      raise ValueError('invalid preprocessing')
    return spec
  except Exception as error:  # JAX raises errors of many kinds for networks that cannot be
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f'its description of the network cannot be read: {reason}') from None


def _encode(value: Any) -> Any:
  """Dataclasses as objects with the name of their class under 'class'."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {'class': type(value).__name__, **fields}
  return [_encode(item) for item in value] if isinstance(value, tuple) else value


_CLASSES = {
  one.__name__: one for one in vars(specs).values() if isinstance(one, type) and dataclasses.is_dataclass(one)
}


def _decode(value: Any) -> Any:
  if isinstance(value, dict):
    return _CLASSES[value['class']](**{key: _decode(item) for key, item in value.items() if key != 'class'})
  return tuple(map(_decode, value)) if isinstance(value, list) else value


NATIVE: Format = Format(
  name='ours',
  ending='.safetensors',
  recognize=lambda content, path: is_safetensors(content) and _metadata(content).get('format') == NAME,
  parse=parse,
  describe=describe,
  read=read,
  dump=dump,
  layer_names=lambda spec: {name: name for name, _ in spec.named_layers()},
)
