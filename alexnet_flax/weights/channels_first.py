"""Kernels and activations as PyTorch and Caffe lay them out, channels first."""

from typing import Any

import numpy as np

from alexnet_flax.models.spec import Dense, Flatten, Spec


def to_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns a kernel as PyTorch and Caffe store it: [O, I, H, W], or [O, I] with I in the order C, H, W.

  `name` is the tensor's ('params/fc6/kernel'; only kernels change), `array` HWIO, or [I, O] with I in the
  order H, W, C.
  """
  if not name.endswith('/kernel'):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
  if name == flattening(spec):
    side, outputs = last_side(spec, spec.image_size), array.shape[1]
    array = array.reshape(side, side, -1, outputs).transpose(2, 0, 1, 3).reshape(-1, outputs)
  return np.ascontiguousarray(array.T)


def from_channels_first(name: str, array: np.ndarray, spec: Spec) -> np.ndarray:
  """Returns the reverse; an array that cannot belong to the layer stays as it is, for `check` to refuse."""
  if not name.endswith('/kernel') or array.ndim not in (2, 4):
    return array
  if array.ndim == 4:
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
  if name == flattening(spec):
    side, outputs = last_side(spec, spec.image_size), array.shape[0]
    if array.shape[1] % (side * side):
      return array
    array = array.reshape(outputs, -1, side, side).transpose(0, 2, 3, 1).reshape(outputs, -1)
  return np.ascontiguousarray(array.T)


def channels_last(array: Any) -> np.ndarray:
  """Copies a channels-first array or tensor [N, C, H, W] to [N, H, W, C]; [N, C] stays as it is."""
  array = np.array(array.numpy() if hasattr(array, 'numpy') else array)
  return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def flattening(spec: Spec) -> str | None:
  """Returns the name of the kernel that sees a flattened image."""
  layers = list(spec.named_layers())
  flat = next((i for i, (_, layer) in enumerate(layers) if isinstance(layer, Flatten)), len(layers))
  return next((f'params/{name}/kernel' for name, layer in layers[flat:] if isinstance(layer, Dense)), None)


def last_side(spec: Spec, size: int) -> int:
  """Returns the side of the image that is flattened, for images of side `size`."""
  return [size, *spec.side_lengths(size).values()][-1]
