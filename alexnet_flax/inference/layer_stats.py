"""Statistics of each layer's output: size, mean, deviation, dead channels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.models.alexnet import AlexNet


class LayerStatistics(NamedTuple):
  """Statistics of one layer's output over a batch of images."""

  name: str
  shape: tuple[int, ...]  # of its output for one image
  parameters: int  # how many
  weight_deviation: float | None  # of its kernel, if it has one
  mean: float
  deviation: float
  zeros: float  # the share of values that are 0
  dead: float  # the share of channels that are never above 0


def layer_statistics(model: AlexNet, variables: Any, images: np.ndarray | jax.Array) -> list[LayerStatistics]:
  """Returns the statistics of every layer over images, uint8 RGB [N, S, S, 3], in the network's order."""

  def taps(variables: Any, images: jax.Array) -> Any:
    inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']
    return model.apply(variables, inputs, train=False, endpoints=True)[1]

  def measure(x: jax.Array) -> tuple[jax.Array, ...]:
    x, dead = x.astype(jnp.float32), jnp.all(x <= 0, axis=tuple(range(x.ndim - 1)))
    return x.mean(), x.std(), jnp.mean(x == 0), jnp.mean(dead)

  shapes = jax.eval_shape(taps, variables, images)
  values = jax.jit(lambda *given: {name: measure(x) for name, x in taps(*given).items()})(variables, images)
  found = []
  for name, _ in model.spec.named_layers():
    own = variables['params'].get(name, {})
    deviation = float(np.std(np.asarray(own['kernel']))) if 'kernel' in own else None
    size = sum(leaf.size for leaf in jax.tree.leaves(own))
    found.append(LayerStatistics(name, shapes[name].shape[1:], size, deviation, *map(float, values[name])))
  return found
