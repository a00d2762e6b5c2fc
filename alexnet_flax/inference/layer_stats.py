"""Statistics of each layer's output: size, mean, deviation, dead channels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet


class LayerStatistics(NamedTuple):
  """Statistics of one layer over a batch of images.

  Attributes:
    name: The name of the layer.
    shape: The shape of its output for one image.
    parameters: Its number of parameters.
    weight_deviation: The standard deviation of its kernel, or None.
    mean, deviation: Mean and standard deviation of its output.
    zeros: The share of its output values that are 0.
    dead: The share of its channels that are never above 0.
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
  """Returns the statistics of every layer over images, uint8 RGB [N, S, S, 3], in the network's order."""

  def taps(variables: Any, images: jax.Array) -> Any:
    inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']
    return model.apply(variables, inputs, train=False, endpoints=True)[1]

  @jax.jit
  def measure(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    return {name: _measure(x.astype(jnp.float32)) for name, x in taps(variables, images).items()}

  shapes = jax.eval_shape(taps, variables, images)
  values = jax.device_get(measure(variables, images))
  found = []
  for name, _ in model.spec.named_layers():
    own = variables['params'].get(name, {})
    deviation = float(np.std(np.asarray(own['kernel']))) if 'kernel' in own else None
    size = sum(leaf.size for leaf in jax.tree.leaves(own))
    found.append(LayerStatistics(name, shapes[name].shape[1:], size, deviation, *map(float, values[name])))
  return found


def _measure(x: jax.Array) -> jax.Array:
  """Returns the mean, the deviation, the share of zeros, and the share of dead channels."""
  dead = jnp.all(x <= 0, axis=tuple(range(x.ndim - 1)))
  return jnp.stack([x.mean(), x.std(), jnp.mean((x == 0).astype(x.dtype)), jnp.mean(dead.astype(x.dtype))])
