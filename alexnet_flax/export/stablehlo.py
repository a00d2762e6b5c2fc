"""StableHLO by `jax.export`, for any batch size; the weights are arguments, in a file beside it.

exported = jax.export.deserialize(pathlib.Path('net.stablehlo').read_bytes())
weights = safetensors.numpy.load_file('net.stablehlo.safetensors')
logits = exported.call(weights, images)  # uint8 RGB [N, S, S, 3]
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from alexnet_flax.data.augment import normalize
from alexnet_flax.files import atomic_path
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec
from alexnet_flax.weights import save_weights
from alexnet_flax.weights.layout import tensors_of, variables_of

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def write(
  path: pathlib.Path, spec: Spec, variables: Mapping[str, Any], class_names: Sequence[str] = ()
) -> list[pathlib.Path]:
  """Writes the program, and the weights in our own format beside it, PATH.safetensors; returns both."""
  tensors, size = tensors_of(variables), spec.image_size
  model = AlexNet(spec, tensors[f'params/{spec.head}/bias'].shape[0])

  def logits(weights: dict[str, Any], images: jax.Array) -> Any:
    inputs = normalize({'image': images}, preprocessing=spec.preprocessing)['image']
    return model.apply(variables_of(weights), inputs, train=False)

  (batch,) = jax.export.symbolic_shape('batch')
  weights = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
  exported = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(weights, images)
  with atomic_path(path) as partial:
    partial.write_bytes(exported.serialize())
  return [path, *save_weights(f'{path}.safetensors', spec, variables, class_names=class_names)]


def run(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
  """Returns the logits [N, C] of the files for images, uint8 RGB [N, S, S, 3]."""
  exported = jax.export.deserialize(bytearray(path.read_bytes()))
  return np.asarray(exported.call(load_file(f'{path}.safetensors'), images))
