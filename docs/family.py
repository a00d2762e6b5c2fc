"""Writes docs/family.md, tables of all variants: `python -m docs.family > docs/family.md`."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, assert_never

import jax
import jax.numpy as jnp

from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import (
  GLOROT_UNIFORM,
  TORCH_UNIFORM,
  Activation,
  BatchNorm,
  Constant,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Multipliers,
  Normal,
  Pool,
  Preprocessing,
  SpatialResponseNorm,
  Spec,
  UniformFanIn,
  VarianceScaling,
  layer_stem,
)
from alexnet_flax.models.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Row:
  """A layer with the shape of its output, [H, W, C] or [C], and its cost for one image."""

  name: str
  layer: Layer
  shape: tuple[int, ...]
  parameters: int
  statistics: int
  multiply_adds: int  # of convolutions and fully connected layers


@functools.cache
def rows(spec: Spec) -> list[Row]:
  """Returns the layers of a network, for its own image size and number of classes."""
  model = AlexNet(spec)
  images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  _, taps = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, endpoints=True), variables, images)

  def size(collection: str, name: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables.get(collection, {}).get(name, {})))

  def multiply_adds(name: str, layer: Layer) -> int:
    if not isinstance(layer, Conv | Dense):
      return 0
    times = 1 if getattr(layer, 'local', False) else math.prod(taps[name].shape[1:-1])
    return times * variables['params'][name]['kernel'].size

  return [
    Row(
      name,
      layer,
      taps[name].shape[1:],
      size('params', name),
      size('batch_stats', name),
      multiply_adds(name, layer),
    )
    for name, layer in spec.named_layers()
  ]


def differences(spec: Spec, other: Spec) -> list[str]:
  """Returns the differences of a network from another, whose values are in parentheses."""
  found = []
  if spec.image_size != other.image_size:
    found.append(f'image: {spec.image_size} pixels ({other.image_size})')
  if spec.preprocessing != other.preprocessing:
    found.append(f'input: {_input(spec.preprocessing)} ({_input(other.preprocessing)})')
  mine_stages, their_stages = _stages(spec), _stages(other)
  for number in sorted(mine_stages | their_stages):
    mine, theirs = (', '.join(stages.get(number, ['nothing'])) for stages in (mine_stages, their_stages))
    if mine != theirs:
      found.append(f'stage {number}: {mine} ({theirs})')
  layers = dict(other.named_layers())
  changes: dict[str, list[str]] = {}  # often several layers have the same change
  for name, layer in spec.named_layers():
    counterpart = layers.get(name, layers.get(name.rstrip('abc')))
    if type(layer) is not type(counterpart):
      continue
    for field, mine in _fields(layer).items():
      if mine != (theirs := _fields(counterpart)[field]):
        changes.setdefault(f'{field} {mine} ({theirs})', []).append(name)
  return found + [f'{", ".join(names)}: {change}' for change, names in changes.items()]


def describe(layer: Layer) -> str:
  """Describes what a layer computes."""
  match layer:
    case Conv():
      groups = f', {layer.groups} groups' if layer.groups > 1 else ''
      local = ', a kernel for each place' if layer.local else ''
      return f'{layer.features} of {_window(layer)}{groups}{local}'
    case Dense():
      return f'{layer.features or "one per class"}'
    case Pool():
      return f'{layer.kind} of {_window(layer)}'
    case LocalResponseNorm():
      within = f', within each of {layer.groups} groups' if layer.groups > 1 else ''
      return f'LRN over {layer.size} channels{within}, {_constants(layer)}'
    case SpatialResponseNorm():
      return f'LRN over {layer.size}x{layer.size} of the same channel, {_constants(layer)}'
    case BatchNorm():
      affine = '' if layer.affine else ', without scale and shift'
      return f'BatchNorm, momentum {layer.momentum:g}, epsilon {layer.epsilon:g}{affine}'
    case Dropout():
      return f'rate {layer.rate:g}'
    case Activation() | Flatten():
      return ''
    case _:
      assert_never(layer)


def markdown() -> str:
  """Returns the page docs/family.md."""
  return '\n'.join(_page()) + '\n'


def _page() -> Iterator[str]:
  yield """# The family

This page is generated from the specs by `python -m docs.family > docs/family.md`; a test checks that it is
up to date. Parameters, statistics (of BatchNorm) and multiply-adds (of convolutions and fully connected
layers, for one image) are for the variant's own image size and number of classes. A local response norm (LRN)
is b = a / (k + alpha * sum a²)^beta. Here alpha always multiplies the plain sum, even if the original program
divides it by the window size.

| variant | image | parameters | statistics | multiply-adds | source |
|---|---|---|---|---|---|"""
  for name, spec in VARIANTS.items():
    totals = ' | '.join(f'{total:,}' for total in _totals(rows(spec)))
    yield f'| [`{name}`](#{name}) | {spec.image_size} | {totals} | {spec.source} |'
  for name, spec in VARIANTS.items():
    yield from _section(name, spec)


def _section(name: str, spec: Spec) -> Iterator[str]:
  yield f'\n## {name}\n'
  yield f'Source: {spec.source}. Input: {spec.image_size}x{spec.image_size}, {_input(spec.preprocessing)}.\n'
  if name != 'paper':
    yield 'Differences from the paper (its values in parentheses):\n'
    yield from (f'- {difference}' for difference in differences(spec, VARIANTS['paper']))
    yield ''
  yield '| layer | description | initialisation | output | parameters | multiply-adds |'
  yield '|---|---|---|---|---|---|'
  for row in rows(spec):
    cells = (row.name, describe(row.layer), _start(row.layer), 'x'.join(map(str, row.shape)))
    costs = (f'{cost:,}' if cost else '' for cost in (row.parameters, row.multiply_adds))
    yield f'| {" | ".join((*cells, *costs))} |'
  parameters, statistics, multiply_adds = _totals(rows(spec))
  total = f'{parameters:,}' + (f' and {statistics:,} statistics' if statistics else '')
  yield f'| | | | | {total} | {multiply_adds:,} |'


def _totals(layers: list[Row]) -> tuple[int, int, int]:
  costs = zip(*((row.parameters, row.statistics, row.multiply_adds) for row in layers), strict=True)
  parameters, statistics, multiply_adds = map(sum, costs)
  return parameters, statistics, multiply_adds


def _stages(spec: Spec) -> dict[int, list[str]]:
  """Returns the kinds of layers in each stage; a stage begins with a weight layer."""
  stages: dict[int, list[str]] = {}
  number = 0
  for layer in spec.layers:
    number += isinstance(layer, Conv | Dense)
    kind = {'LocalResponseNorm': 'LRN', 'SpatialResponseNorm': 'spatial LRN'}.get(type(layer).__name__)
    kind = kind or (type(layer).__name__ if isinstance(layer, BatchNorm) else layer_stem(layer))
    stages.setdefault(number, []).append(kind)
  return stages


def _fields(layer: Any) -> dict[str, str]:
  values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
  if isinstance(layer, Conv | Pool):
    values['padding'] = _padding(layer)
  return {name.replace('_', ' '): _value(value) for name, value in values.items()}


def _padding(layer: Conv | Pool) -> int | str:
  """Returns the padding, as a number if possible."""
  if layer.padding == 'SAME' and layer.strides == 1 and layer.kernel_size % 2:
    return layer.kernel_size // 2
  return 0 if layer.padding == 'VALID' else layer.padding


def _window(layer: Conv | Pool) -> str:
  ceil = ', rounded up' if layer.ceil_mode else ''
  strides = f'stride {layer.strides}, ' if layer.strides > 1 else ''
  return f'{layer.kernel_size}x{layer.kernel_size}, {strides}padding {_padding(layer)}{ceil}'


def _constants(layer: LocalResponseNorm | SpatialResponseNorm) -> str:
  return f'k {layer.k:g}, alpha {layer.alpha:.3g}, beta {layer.beta:g}'


def _start(layer: Layer) -> str:
  """Describes the initialisation of weights and biases, and the multipliers of their learning rates."""
  if isinstance(layer, Conv | Dense):
    start = f'{_value(layer.kernel_init)}; bias {_value(layer.bias_init)}'
    rates = _value(layer.multipliers)
    return start if rates == 'none' else f'{start}; {rates}'
  return ''


def _input(preprocessing: Preprocessing) -> str:
  scale = 255 * preprocessing.scale
  mean, std = (', '.join(f'{x:g}' for x in values) for values in (preprocessing.mean, preprocessing.std))
  divided = '' if set(preprocessing.std) == {1.0} else f' over std ({std})'
  subtracted = f' less mean ({mean})' if any(preprocessing.mean) else ''
  return f'{preprocessing.channel_order} 0..{scale:g}{subtracted}{divided}'


def _value(value: Any) -> str:
  match value:
    case Normal():
      return f'N(0, {value.stddev:g})'
    case VarianceScaling():
      kind = {GLOROT_UNIFORM: 'Glorot uniform', TORCH_UNIFORM: 'PyTorch uniform'}.get(value)
      return kind or f'{value.distribution} with variance {value.scale:g} / {value.mode}'
    case UniformFanIn():
      return 'PyTorch uniform'
    case Constant():
      return f'{value.value:g}'
    case Multipliers():
      default = Multipliers()
      changed = [
        f'{field.name.replace("_", " ")} x{getattr(value, field.name):g}'
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != getattr(default, field.name)
      ]
      return ', '.join(changed) or 'none'
    case float():
      return f'{value:.3g}'
    case _:
      return str(value)


if __name__ == '__main__':
  print(markdown(), end='')
