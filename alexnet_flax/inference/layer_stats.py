"""What each layer makes of some images: sizes, spread, and units that stay silent."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet


class LayerStatistics(NamedTuple):
  """Of one layer's output over some images.

  Attributes:
    name: the layer's.
    shape: of its output for one image.
    parameters: how many it has.
    weight_deviation: standard deviation of its kernel, or None.
    mean, deviation: of its output.
    zeros: share of its values that are 0.
    dead: share of its channels that are nowhere above 0.
  """

  name: str
  shape: tuple[int, ...]
  parameters: int
  weight_deviation: float | None
  mean: float
  deviation: float
  zeros: float
  dead: float


def layer_statistics(model: AlexNet, variables: Any, images: np.ndarray | jax.Array) -> list[LayerStatistics]:
  """The statistics of every layer, in the order of the network.

  Args:
    model: the network.
    variables: its variables.
    images: uint8 RGB [N, S, S, 3].
  """

  @jax.jit
  def measure(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    taps = _taps(model, variables, images)
    return {name: _measured(x.astype(jnp.float32)) for name, x in taps.items()}

  shapes = jax.eval_shape(functools.partial(_taps, model), variables, images)
  values = jax.device_get(measure(variables, images))
  found = []
  for name, _ in model.spec.named_layers():
    own = variables['params'].get(name, {})
    deviation = float(np.std(np.asarray(own['kernel']))) if 'kernel' in own else None
    size = sum(leaf.size for leaf in jax.tree.leaves(own))
    found.append(LayerStatistics(name, shapes[name].shape[1:], size, deviation, *map(float, values[name])))
  return found


def _taps(model: AlexNet, variables: Any, images: jax.Array) -> Any:
  inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']
  return model.apply(variables, inputs, train=False, endpoints=True)[1]


def _measured(x: jax.Array) -> jax.Array:
  """Mean, deviation, share of zeros, share of silent channels."""
  silent = jnp.all(x <= 0, axis=tuple(range(x.ndim - 1)))
  return jnp.stack([x.mean(), x.std(), jnp.mean((x == 0).astype(x.dtype)), jnp.mean(silent.astype(x.dtype))])
