"""How a run is divided over its devices: the batch over all, the fully connected layers over some.

Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997): the
fully connected layers hold some 94 % of the parameters and little of the arithmetic. Divided by their outputs
over the devices of the axis 'model', their gradients need not be summed over these; instead, their inputs are
gathered.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alexnet_flax.models.spec import Dense, Spec
from alexnet_flax.steps import TrainState

AXES = ('data', 'model')  # of the mesh; the batch is divided over both


def make_mesh(devices: Sequence[Any], model: int) -> Mesh:
  """Returns the mesh [data, model] of these devices, of which `model` share the fully connected layers."""
  shape = (len(devices) // model, model)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def dense_input(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a fully connected layer's input [B, F]: whole on the devices that share it."""
  return NamedSharding(mesh, PartitionSpec('data'))


def state_sharding(state: TrainState, spec: Spec, mesh: Mesh) -> TrainState:
  """Returns the sharding of each leaf: of what belongs to fully connected layers by outputs, of others none.

  A layer whose outputs the axis 'model' does not divide is not divided.

  Args:
    state: The state, or its shapes.
    spec: The network.
    mesh: From `make_mesh`.
  """
  dense = {name for name, layer in spec.named_layers() if isinstance(layer, Dense)}

  def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    is_divided = not dense.isdisjoint(getattr(key, 'key', None) for key in path) and leaf.ndim
    if is_divided and leaf.shape[-1] % mesh.shape['model'] == 0:
      return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), 'model'))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding, state)
