"""Convolutions on CPUs, where XLA's compiler is slow at some; GPUs and TPUs get `lax.conv_general_dilated`.

`convolve` takes its place where `fastest` finds that something else is faster:

- 'filtering', minimal filtering for 3x3 and 5x5 at stride 1 (`winograd.py`);
- 'blocks', for images of few channels (conv1: 11x11, stride 4). The image is cut into 4x4 blocks, so that the
  window of an output lies in 3x3 whole blocks: the output is a 3x3 convolution of these at stride 1, by
  minimal filtering. The kernel's derivative is one matrix product, at any stride. A row of the matrix is one
  number of one of the blocks, for all outputs: contiguous, if the dimensions of the images come last;
- 'pairs', for few features of three channels at stride 1, at which XLA's library is slow: two outputs side by
  side are one of twice the features, and two inputs one of six channels;
- 'dense', for images smaller than the kernel, as the last of a network for CIFAR-10: one matrix product,
  with an entry for each pair of an input and an output: no more than taps for each output. The kernel's
  derivative is one product for each tap.

The convolution is a JAX primitive of its own. It is bilinear, so it can be differentiated any number of
times, forwards and backwards; each platform has its own lowering; `vmap` makes it JAX's own convolution.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from alexnet_flax.models import winograd
from alexnet_flax.models.winograd import Geometry, padded, sum_parts

Kind = Literal['output', 'input', 'kernel']
Algorithm = Literal['filtering', 'blocks', 'pairs', 'dense']

# Where ours are faster, measured in CPU time (docs/performance.md). Minimal filtering, by kernel: the least
# channels, the least rows of the products (tiles of all images; more count where there are groups), and the
# least product of the two. Tiles may have so many times the outputs that are needed.
_LEAST = {(3, 3): (64, 64, 8192), (5, 5): (32, 49, 2304)}
_MOST_COMPUTED = 1.6
# Blocks: the most channels, the least outputs of all images, the least features. For fewer features, XLA's
# output takes less CPU time, if on one core. The input's derivative has no such algorithm.
_MOST_INPUTS, _LEAST_OUTPUTS = 4, 50_000
_LEAST_FEATURES: Mapping[Kind, float] = {'output': 64, 'kernel': 16, 'input': math.inf}

_MOST_FEATURES_IN_PAIRS = 32  # of three channels; XLA is fast at others

_LEAST_SMALL_IMAGES = 16  # smaller than the kernel: for fewer, laying out the matrix takes longer

_CACHED = 12e6  # the bytes of the windows that are processed together
_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def block_convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Convolves [B, H, W, C] with [R, S, C, F] at strides that cut the kernel into 3x3 or 5x5 blocks."""
  (down, right), (rows, columns) = geometry.strides, _blocks(geometry)
  x = _in_blocks(x, geometry).swapaxes(2, 3)
  size = x.shape[1], x.shape[2]
  x = x.reshape(x.shape[0], *size, -1)
  after = [(0, rows * down - kernel.shape[0]), (0, columns * right - kernel.shape[1]), (0, 0), (0, 0)]
  kernel = jnp.pad(kernel, after).reshape(rows, down, columns, right * kernel.shape[2], -1).swapaxes(1, 2)
  kernel = kernel.reshape(rows, columns, x.shape[3], -1)
  return winograd.convolve(x, kernel, Geometry(size, (rows, columns), (1, 1), ((0, 0), (0, 0)), 1))


def _blocks(geometry: Geometry) -> tuple[int, int]:
  """Returns the sides of the kernel in blocks of the strides' size."""
  rows, columns = (
    math.ceil(taps / step) for taps, step in zip(geometry.kernel, geometry.strides, strict=True)
  )
  return rows, columns


def _in_blocks(x: jax.Array, geometry: Geometry) -> jax.Array:
  """Cuts padded images [B, H, W, C] into blocks of the strides: [B, rows, down, columns, right C]."""
  (height, width), (down, right), (rows, columns) = geometry.output, geometry.strides, _blocks(geometry)
  size = height + rows - 1, width + columns - 1
  x = padded(x, geometry, (size[0] * down, size[1] * right))
  return x.reshape(-1, size[0], down, size[1], right * x.shape[3])


def block_kernel_gradient(x: jax.Array, cotangent: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns the derivative [R, S, C, F] of a convolution of [B, H, W, C] by its kernel, for any strides."""
  (height, width), down = geometry.output, geometry.strides[0]
  _, columns = _blocks(geometry)
  taps, row = geometry.kernel[0], geometry.kernel[1] * x.shape[3]

  def part(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    x = _in_blocks(x, geometry).transpose(2, 4, 0, 1, 3)

    def windows_of(tap: int) -> jax.Array:
      """A row of the kernel's taps: [S C, B, H', W']."""
      below = x[tap % down, :, :, tap // down : tap // down + height]
      return jnp.concatenate([below[..., s : s + width] for s in range(columns)])[:row]

    windows = jnp.stack([windows_of(tap) for tap in range(taps)])
    return lax.dot_general(windows, cotangent, (((2, 3, 4), (0, 1, 2)), ((), ())))

  parts = sum_parts(part, (x, cotangent), max(1, int(_CACHED // (4 * height * width * taps * row))))
  return parts.reshape(*geometry.kernel, x.shape[3], -1)


def paired_convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Convolves [B, H, W, C] with [R, S, C, F] at stride 1, in pairs of columns."""
  (height, width), (rows, taps) = geometry.output, geometry.kernel
  pairs, columns = (width + 1) // 2, taps // 2 + 1
  size = height + rows - 1, pairs + columns - 1
  x = padded(x, geometry, (size[0], 2 * size[1])).reshape(-1, *size, 2 * x.shape[3])
  spare = 2 * columns - taps
  both = [jnp.pad(kernel, [(0, 0), (first, spare - first), (0, 0), (0, 0)]) for first in range(2)]
  kernel = jnp.stack(both, axis=3).reshape(rows, columns, x.shape[3], -1)
  y = lax.conv_general_dilated(x, kernel, (1, 1), 'VALID', dimension_numbers=_DIMENSIONS)
  return y.reshape(-1, height, 2 * pairs, kernel.shape[3] // 2)[:, :, :width]


def dense_kernel(kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Lays out a kernel [R, S, C, F], at stride 1, as the matrix [H W C, H' W' F] that multiplies images."""
  for axis, (side, outputs, taps, pads) in enumerate(
    zip(geometry.image, geometry.output, geometry.kernel, geometry.padding, strict=True)
  ):
    # Output i is the sum of input r times tap r - i + pads[0].
    room = max(0, outputs - 1 - pads[0]), max(0, side + pads[0] - taps)
    kernel = jnp.pad(kernel, [room if dimension == 2 * axis else (0, 0) for dimension in range(kernel.ndim)])
    first = room[0] + pads[0]
    rows = [lax.slice_in_dim(kernel, first - i, first - i + side, axis=2 * axis) for i in range(outputs)]
    kernel = jnp.stack(rows, 2 * axis + 1)
  return kernel.transpose(0, 2, 4, 1, 3, 5).reshape(math.prod(kernel.shape[0:4:2]) * kernel.shape[4], -1)


def dense_convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Convolves images [B, H, W, C] with a kernel [R, S, C, F] at stride 1, as one matrix product."""
  return (x.reshape(x.shape[0], -1) @ dense_kernel(kernel, geometry)).reshape(
    x.shape[0], *geometry.output, kernel.shape[3]
  )


def dense_input_gradient(cotangent: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns the derivative [B, H, W, C] of `dense_convolve` by the images."""
  product = cotangent.reshape(cotangent.shape[0], -1) @ dense_kernel(kernel, geometry).T
  return product.reshape(cotangent.shape[0], *geometry.image, kernel.shape[2])


def dense_kernel_gradient(x: jax.Array, cotangent: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns the derivative [R, S, C, F] of `dense_convolve` by the kernel, from what each tap connects."""

  def spans(axis: int) -> list[tuple[slice, slice]]:
    """Returns the inputs and the outputs that each tap connects, along a side."""
    side, outputs, before = geometry.image[axis], geometry.output[axis], geometry.padding[axis][0]
    connected = []
    for shift in range(-before, geometry.kernel[axis] - before):
      first = max(0, -shift)
      last = max(first, min(outputs, side - shift))
      connected.append((slice(first + shift, last + shift), slice(first, last)))
    return connected

  every = (0, 1, 2)
  taps = [
    lax.dot_general(x[:, rows[0], columns[0]], cotangent[:, rows[1], columns[1]], ((every, every), ((), ())))
    for rows, columns in itertools.product(spans(0), spans(1))
  ]
  return jnp.stack(taps).reshape(*geometry.kernel, *taps[0].shape)


_ALGORITHMS: Mapping[Algorithm, Mapping[Kind, Callable[[jax.Array, jax.Array, Geometry], jax.Array]]] = {
  'filtering': {
    'output': winograd.convolve,
    'input': winograd.input_gradient,
    'kernel': winograd.kernel_gradient,
  },
  'blocks': {'output': block_convolve, 'kernel': block_kernel_gradient},
  'pairs': {'output': paired_convolve},
  'dense': {'output': dense_convolve, 'input': dense_input_gradient, 'kernel': dense_kernel_gradient},
}


def fast(a: jax.Array, b: jax.Array, *, kind: Kind, geometry: Geometry, algorithm: Algorithm) -> jax.Array:
  """Computes what `reference` does, by an algorithm of this module."""
  function = _ALGORITHMS[algorithm][kind]
  groups = zip(*(jnp.split(array, geometry.groups, -1) for array in (a, b)), strict=True)
  return jnp.concatenate([function(x, y, geometry) for x, y in groups], -1)


def reference(a: jax.Array, b: jax.Array, *, kind: Kind, geometry: Geometry) -> jax.Array:
  """Computes a convolution or one of its derivatives by JAX's own operations.

  Args:
    a: The input [B, H, W, C], or for kind 'input' the output's cotangent.
    b: The kernel [R, S, C / groups, F], or for kind 'kernel' the output's cotangent.
    kind: What is returned: the output, or the cotangent of the input or of the kernel.
    geometry: The convolution.
  """

  def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
      x,
      kernel,
      geometry.strides,
      geometry.padding,
      dimension_numbers=_DIMENSIONS,
      feature_group_count=geometry.groups,
    )

  if kind == 'output':
    return convolution(a, b)
  if kind == 'input':
    like = jax.ShapeDtypeStruct((a.shape[0], *geometry.image, b.shape[2] * geometry.groups), a.dtype)
    return jax.linear_transpose(lambda x: convolution(x, b), like)(a)[0]
  like = jax.ShapeDtypeStruct((*geometry.kernel, a.shape[3] // geometry.groups, b.shape[3]), a.dtype)
  return jax.linear_transpose(lambda kernel: convolution(a, kernel), like)(b)[0]


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  feature_group_count: int,
  **options: Any,
) -> jax.Array:
  """Computes `lax.conv_general_dilated`, on a CPU by this module's algorithms where they are faster.

  For `nn.Conv(conv_general_dilated_cls=lambda: convolve)`, without dilations.
  JAX's own convolution computes other types than float32, shapes that are not known yet, and programs for
  several devices, which would have to exchange more than the derivative of the kernel.
  """
  plain = functools.partial(
    lax.conv_general_dilated, x, kernel, strides, padding, feature_group_count=feature_group_count, **options
  )
  if not x.dtype == kernel.dtype == jnp.float32 or not on_one_device(x, kernel):
    return plain()
  sides, pads = zip(x.shape[1:3], kernel.shape[:2], strides, strict=True), tuple(padding)
  (height, rows, down), (width, columns, right) = sides
  geometry = Geometry(
    (height, width), (rows, columns), (down, right), (pads[0], pads[1]), feature_group_count
  )
  channels = _channels(x, kernel, 'output', geometry)
  if not any(fastest(kind, geometry, x.shape[0], *channels) for kind in _KINDS):
    return plain()
  return _convolution_p.bind(x, kernel, kind='output', geometry=geometry)


def on_one_device(*arrays: jax.Array) -> bool:
  """Returns whether shapes are known, and arrays are neither divided nor computed for several devices."""
  meshes = jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)
  return (
    all(isinstance(side, int) for array in arrays for side in array.shape)
    and jax.device_count() == 1
    and not {kind for mesh in meshes for kind in mesh.axis_types} - {AxisType.Auto}
  )


def fastest(kind: Kind, geometry: Geometry, images: int, inputs: int, features: int) -> Algorithm | None:
  """Returns what has been measured to be fastest, None for `reference`; channels are those of a group."""
  outputs, unit = images * math.prod(geometry.output), geometry.strides == (1, 1)
  few = 0 < inputs <= _MOST_INPUTS and features >= _LEAST_FEATURES[kind] and outputs >= _LEAST_OUTPUTS
  in_blocks = inputs >= 3 and min(geometry.strides) >= 3 and _blocks(geometry) == (3, 3)
  if few and (kind == 'kernel' or in_blocks):
    return 'blocks'
  if unit and geometry.kernel in _LEAST:
    least_channels, least_rows, least_product = _LEAST[geometry.kernel]
    tiles = images * math.prod(winograd.tiles(geometry))
    # JAX's own convolutions in groups are several times slower.
    channels, rows = min(inputs, features), tiles * geometry.groups**2
    many = channels >= least_channels and rows >= least_rows and channels * rows >= least_product
    if many and tiles * winograd.TILE**2 <= _MOST_COMPUTED * outputs:
      return 'filtering'
  if unit and _is_small(geometry) and images >= _LEAST_SMALL_IMAGES:
    return 'dense'
  in_pairs = unit and kind == 'output' and min(geometry.kernel) >= 3 and 0 not in geometry.output
  return 'pairs' if in_pairs and inputs == 3 and features <= _MOST_FEATURES_IN_PAIRS else None


def _is_small(geometry: Geometry) -> bool:
  """Returns whether both sides of the image are smaller than the kernel's, and there are outputs."""
  small = all(side < taps for side, taps in zip(geometry.image, geometry.kernel, strict=True))
  return small and 0 not in geometry.output


def _channels(a: jax.Array, b: jax.Array, kind: Kind, geometry: Geometry) -> tuple[int, int]:
  """Returns the channels before and after the convolution, in each group."""
  inputs = a.shape[3] // geometry.groups if kind == 'kernel' else b.shape[2]
  return inputs, b.shape[3] // geometry.groups


def _on_cpu(a: jax.Array, b: jax.Array, *, kind: Kind, geometry: Geometry) -> jax.Array:
  algorithm = fastest(kind, geometry, a.shape[0], *_channels(a, b, kind, geometry))
  if algorithm is None:
    return reference(a, b, kind=kind, geometry=geometry)
  return fast(a, b, kind=kind, geometry=geometry, algorithm=algorithm)


def _shape(a: Any, b: Any, *, kind: Kind, geometry: Geometry) -> jax.core.ShapedArray:
  result = jax.eval_shape(functools.partial(reference, kind=kind, geometry=geometry), a, b)
  return jax.core.ShapedArray(result.shape, result.dtype)


def _transpose(cotangent: Any, a: Any, b: Any, *, kind: Kind, geometry: Geometry, first: bool) -> jax.Array:
  """Returns the cotangent of a factor. Input, kernel and output are three factors of one sum of products."""
  bind = functools.partial(_convolution_p.bind, geometry=geometry)
  match kind, first:
    case 'output', True:
      return bind(cotangent, b, kind='input')
    case 'output', False:
      return bind(a, cotangent, kind='kernel')
    case 'input', True:
      return bind(cotangent, b, kind='output')
    case 'input', False:
      return bind(cotangent, a, kind='kernel')
    case 'kernel', True:
      return bind(b, cotangent, kind='input')
  return bind(a, cotangent, kind='output')


def _batched(arrays: Any, dimensions: Any, **parameters: Any) -> tuple[jax.Array, int]:
  return jax.vmap(functools.partial(reference, **parameters), dimensions)(*arrays), 0


_KINDS: tuple[Kind, ...] = get_args(Kind)
_convolution_p = Primitive('cpu_convolution')
_convolution_p.def_impl(jax.jit(_convolution_p.bind, static_argnames=('kind', 'geometry')))
_convolution_p.def_abstract_eval(_shape)
ad.defbilinear(
  _convolution_p, functools.partial(_transpose, first=True), functools.partial(_transpose, first=False)
)
batching.primitive_batchers[_convolution_p] = _batched
mlir.register_lowering(_convolution_p, mlir.lower_fun(reference, multiple_results=False))
mlir.register_lowering(_convolution_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform='cpu')
