"""Minimal filtering (Winograd 1980; Lavin and Gray 2015): convolutions of 3x3 and 5x5 at stride 1.

The product of two polynomials with m and r coefficients has n = m + r - 1 coefficients, so its values at n
points determine it: evaluate both factors, multiply n numbers instead of m r, interpolate (Cook and Toom).
Transposed, the same three matrices compute m outputs of a filter g with r taps from n inputs d:

  y = A^T ((G g) * (B^T d))

A holds the points' powers below m, G those below r, and B^T is the transposed inverse of the n x n matrix of
powers. In two dimensions the matrices act on rows and columns: F(4x4, 3x3) has 36 products where 144 are
usual, F(4x4, 5x5) 64 instead of 400. Summed over input channels, the products at one point become a matrix
product of [tiles, inputs] by [inputs, features]. The derivative by the kernel is G^T (V^T M) G, with the
transformed input V and M = A dY A^T; that by the input is a convolution of dY with the turned kernel.

Rounding errors grow with the size of the points' powers. So the points are few and small, 0, 1, -1, 1/2, -2
and infinity for 3x3, which leaves errors below 1e-5 of the greatest value.

Four tiles of 4 for 13 outputs compute half as much again as is needed, in two dimensions. So images are laid
out in sheets, two to a side, with the convolution's own zeros between them: 27 outputs are seven tiles. A
tile on a border multiplies the neighbour's values by factors that cancel, but for rounding. So that it does
not matter how great those are, each image is divided by a power of two near its greatest value, which is
exact, and its result is multiplied by it. What is not finite makes the whole result of its image NaN.

The work is done for a few sheets at a time, so that what lies between the products stays in the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Matrix = list[list[Fraction]]

INFINITY = None
TILE = 4  # outputs of a tile, per side
_HALF = Fraction(1, 2)
# By the number of points. Other choices have up to four times the error.
_POINTS: dict[int, tuple[Fraction | int | None, ...]] = {
  6: (0, 1, -1, _HALF, -2, INFINITY),
  8: (0, 1, -1, _HALF, -_HALF, 2, -2, INFINITY),
}
_FEWER = 0.95  # the share of the tiles below which sheets are worth their copies
# By the taps per side: the bytes between two products of the sheets that are processed together. With few
# channels a product takes so little time that it waits for memory if these do not stay in the cache.
_CACHED = {3: 45e6, 5: 40e6}
_CACHED_OF_FEW, _FEW = 12e6, {3: 80, 5: 40}  # half the harmonic mean of inputs and features


@dataclasses.dataclass(frozen=True)
class Geometry:
  """A convolution of [B, H, W, C] by [R, S, C / groups, F], as far as its arguments' shapes leave it open."""

  image: tuple[int, int]
  kernel: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  groups: int

  @property
  def output(self) -> tuple[int, int]:
    """The sides of the output; 0 if the kernel is larger than the padded image."""
    one = [
      max(0, (side + sum(pads) - taps) // stride + 1)
      for side, pads, taps, stride in zip(self.image, self.padding, self.kernel, self.strides, strict=True)
    ]
    return one[0], one[1]

  def sheet(self, count: int) -> 'Geometry':
    """Returns the convolution of a sheet of `count` x `count` images."""
    (down, right), (height, width) = self.period, self.image
    image = (count - 1) * down + height, (count - 1) * right + width
    return dataclasses.replace(self, image=image)

  @property
  def period(self) -> tuple[int, int]:
    """The rows and columns from an image of a sheet to the next: no window meets two images."""
    down, right = (
      max(side + max(0, *pads), out)
      for side, pads, out in zip(self.image, self.padding, self.output, strict=True)
    )
    return down, right


def cook_toom(
  outputs: int, taps: int, points: Sequence[Fraction | int | None]
) -> tuple[Matrix, Matrix, Matrix]:
  """Returns exact A^T [outputs, n], G [n, taps] and B^T [n, n]: A^T ((G g) * (B^T d)) filters d by g.

  Args:
    outputs, taps: The numbers m and r of outputs and of taps.
    points: n = m + r - 1 distinct points; None is infinity.
  """
  count = outputs + taps - 1
  if len(set(points)) != count or len(points) != count:
    raise ValueError(f'points (={points}) must be {count} different ones')
  interpolation = _inverse(_powers(points, count))
  # A row of B^T and the same row of G may share a factor; a power of two changes no rounding.
  scales = [Fraction(2) ** round(math.log2(sum(map(abs, row)))) for row in zip(*interpolation, strict=True)]
  transform = [[x / s for x in row] for row, s in zip(zip(*interpolation, strict=True), scales, strict=True)]
  kernel = [[x * s for x in row] for row, s in zip(_powers(points, taps), scales, strict=True)]
  return [list(row) for row in zip(*_powers(points, outputs), strict=True)], kernel, transform


def _powers(points: Sequence[Fraction | int | None], count: int) -> Matrix:
  """Returns the rows 1, p, p^2, ...; that of infinity keeps the highest coefficient alone."""
  last = [Fraction(0)] * (count - 1) + [Fraction(1)]
  return [last if p is INFINITY else [Fraction(p) ** k for k in range(count)] for p in points]


def _inverse(matrix: Matrix) -> Matrix:
  """Returns the inverse, by elimination."""
  size = len(matrix)
  rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
  for column in range(size):
    pivot = next(i for i in range(column, size) if rows[i][column])
    rows[column], rows[pivot] = rows[pivot], rows[column]
    rows[column] = [x / rows[column][column] for x in rows[column]]
    for i in range(size):
      if i != column:
        rows[i] = [x - rows[i][column] * y for x, y in zip(rows[i], rows[column], strict=True)]
  return [row[size:] for row in rows]


@functools.cache
def _matrices(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns A^T, G and B^T for both dimensions at once, float32 [m^2, n^2], [n^2, r^2] and [n^2, n^2]."""
  one = cook_toom(TILE, taps, _POINTS[TILE + taps - 1])
  a, g, b = (np.array(matrix, np.float64) for matrix in one)
  return tuple(np.kron(matrix, matrix).astype(np.float32) for matrix in (a, g, b))  # type: ignore[return-value]


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Convolves float32 [B, H, W, C] with [R, R, C, F] at stride 1: [B, H', W', F]."""
  a, g, _ = _matrices(geometry.kernel[0])
  kernels = _first(g, kernel.reshape(-1, *kernel.shape[2:]))  # [n^2, C, F]
  count = _images_per_side(geometry, x.shape[0])
  sheet = geometry.sheet(count)

  def part(x: jax.Array) -> jax.Array:
    products = lax.dot_general(_transformed(x, sheet), kernels, (((4,), (1,)), ((0,), (0,))))
    return _from_tiles(_first(a, products), sheet)

  at_once = _at_once(sheet, x.shape[3], kernel.shape[3])
  if count == 1:
    return _map_parts(part, (x,), at_once)
  scaled, size = _scaled(x)
  is_finite = jnp.isfinite(size)
  sheets = _to_sheets(jnp.where(is_finite, scaled, 0), geometry, count)
  out = _from_sheets(_map_parts(part, (sheets,), at_once), geometry, count)
  return jnp.where(is_finite, out * size, jnp.nan)


def kernel_gradient(x: jax.Array, cotangent: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns the derivative [R, R, C, F] of sum(cotangent * convolve(x, kernel)) by the kernel."""
  a, g, _ = _matrices(geometry.kernel[0])
  count = _images_per_side(geometry, x.shape[0])
  sheet = geometry.sheet(count)

  def part(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    products = _first(a.T, _to_tiles(cotangent, sheet))
    every = (1, 2, 3)
    return lax.dot_general(_transformed(x, sheet), products, ((every, every), ((0,), (0,))))

  if count > 1:
    x, size = _scaled(x)
    x, cotangent = (_to_sheets(array, geometry, count) for array in (x, cotangent * size))
  parts = sum_parts(part, (x, cotangent), _at_once(sheet, x.shape[3], cotangent.shape[3]))
  return _first(g.T, parts).reshape(*geometry.kernel, *parts.shape[1:])


def input_gradient(cotangent: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns the derivative [B, H, W, C] by the input: the convolution with the kernel turned by 180°."""
  taps = geometry.kernel[0]
  pads = [
    (taps - 1 - before, side - out + before)
    for (before, _), side, out in zip(geometry.padding, geometry.image, geometry.output, strict=True)
  ]
  turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  backwards = dataclasses.replace(geometry, image=geometry.output, padding=(pads[0], pads[1]))
  return convolve(cotangent, turned, backwards)


def _first(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """Multiplies [P, K] by [K, ...]."""
  return lax.dot_general(np.ascontiguousarray(matrix), x, (((1,), (0,)), ((), ())))


def tiles(geometry: Geometry) -> tuple[int, int]:
  """Returns the rows and columns of tiles."""
  height, width = geometry.output
  return -(-height // TILE), -(-width // TILE)


def _images_per_side(geometry: Geometry, images: int) -> int:
  """Returns 2 if sheets of four images have fewer tiles and leave no image over; else 1."""
  apart, together = (math.prod(tiles(geometry.sheet(count))) / count**2 for count in (1, 2))
  return 2 if images % 4 == 0 and together < _FEWER * apart else 1


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Divides each image by a power of two near its greatest value; returns that too, [B, 1, 1, 1].

  It is 0 for an image of zeros, and not finite if a value is not.
  """
  greatest = jnp.abs(x).max((1, 2, 3), keepdims=True)
  # Up to 2^126, whose reciprocal is a normal number too.
  power = lax.reduce_precision(jnp.minimum(greatest, 2.0**126), exponent_bits=8, mantissa_bits=0)
  return x / jnp.where(power == 0, 1, power), jnp.where(jnp.isfinite(greatest), power, greatest)


def _to_sheets(x: jax.Array, geometry: Geometry, count: int) -> jax.Array:
  """Lays out images, or outputs, [B, H, W, C] in sheets: [B / n^2, H + (n - 1) rows to the next, ..., C]."""
  _, height, width, channels = x.shape
  down, right = geometry.period
  x = jnp.pad(x, ((0, 0), (0, down - height), (0, right - width), (0, 0)))
  x = x.reshape(-1, count, count, down, right, channels).swapaxes(2, 3)
  x = x.reshape(-1, count * down, count * right, channels)
  return x[:, : (count - 1) * down + height, : (count - 1) * right + width]


def _from_sheets(y: jax.Array, geometry: Geometry, count: int) -> jax.Array:
  """Cuts the outputs of sheets apart: [B, H', W', F]."""
  (down, right), (height, width) = geometry.period, geometry.output
  y = jnp.pad(y, ((0, 0), (0, down - height), (0, right - width), (0, 0)))
  y = y.reshape(-1, count, down, count, right, y.shape[3]).swapaxes(2, 3)
  return y.reshape(-1, down, right, y.shape[5])[:, :height, :width]


def _at_once(geometry: Geometry, inputs: int, features: int) -> int:
  """Returns for how many sheets all points of all tiles fit into the cache."""
  taps, channels = geometry.kernel[0], inputs + features
  points = (TILE + taps - 1) ** 2
  cached = _CACHED_OF_FEW if inputs * features < _FEW[taps] * channels else _CACHED[taps]
  return max(1, int(cached // (4 * points * math.prod(tiles(geometry)) * channels)))


def padded(x: jax.Array, geometry: Geometry, sides: tuple[int, int]) -> jax.Array:
  """Pads before as the convolution does, and after until the sides are as stated; cuts what is too long."""
  (top, _), (left, _) = geometry.padding
  pads = (
    (0, 0, 0),
    (top, sides[0] - top - x.shape[1], 0),
    (left, sides[1] - left - x.shape[2], 0),
    (0, 0, 0),
  )
  return lax.pad(x, np.zeros((), x.dtype), pads)


def _transformed(x: jax.Array, geometry: Geometry) -> jax.Array:
  """Returns B^T d B for the window d of each tile: [n^2, B, rows of tiles, columns of tiles, C]."""
  rows, columns = tiles(geometry)
  # Neighbouring windows overlap by taps - 1 <= TILE, so that each is in two blocks of TILE, per side.
  blocks = _blocks(padded(x, geometry, ((rows + 1) * TILE, (columns + 1) * TILE)))
  over = geometry.kernel[0] - 1
  high = jnp.concatenate([blocks[:, :, :, :rows], blocks[:over, :, :, 1:]], 0)
  windows = jnp.concatenate([high[:, :, :, :, :columns], high[:, :over, :, :, 1:]], 1)
  return _first(_matrices(geometry.kernel[0])[2], windows.reshape(-1, *windows.shape[2:]))


def _to_tiles(y: jax.Array, geometry: Geometry) -> jax.Array:
  """[B, H', W', F] to [m^2, B, rows of tiles, columns of tiles, F]; what tiles have too much is 0."""
  after = [count * TILE - side for count, side in zip(tiles(geometry), geometry.output, strict=True)]
  blocks = _blocks(jnp.pad(y, ((0, 0), (0, after[0]), (0, after[1]), (0, 0))))
  return blocks.reshape(-1, *blocks.shape[2:])


def _blocks(x: jax.Array) -> jax.Array:
  """[B, m R, m S, C] to [m, m, B, R, S, C]."""
  images, height, width, channels = x.shape
  x = x.reshape(images, height // TILE, TILE, width // TILE, TILE, channels)
  return x.transpose(2, 4, 0, 1, 3, 5)


def _from_tiles(values: jax.Array, geometry: Geometry) -> jax.Array:
  """[m^2, B, rows of tiles, columns of tiles, F] to [B, H', W', F]."""
  _, images, rows, columns, features = values.shape
  values = values.reshape(TILE, TILE, images, rows, columns, features).transpose(2, 3, 0, 4, 1, 5)
  height, width = geometry.output
  return values.reshape(images, rows * TILE, columns * TILE, features)[:, :height, :width]


def _split(arrays: Sequence[jax.Array], size: int) -> tuple[list[jax.Array], list[jax.Array]]:
  """Splits [B, ...] into [N, at most `size`, ...], parts of equal size if possible, and what is left over."""
  images = arrays[0].shape[0]
  least = -(-images // size)
  count = next((count for count in range(least, 2 * least) if images % count == 0), least)
  size = -(-images // count)
  whole = images // size * size
  return [x[:whole].reshape(-1, size, *x.shape[1:]) for x in arrays], [x[whole:] for x in arrays]


def _map_parts(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], size: int) -> jax.Array:
  """Applies a function to at most `size` images at a time."""
  if arrays[0].shape[0] <= size:
    return function(*arrays)
  parts, rest = _split(arrays, size)
  out = lax.map(lambda part: function(*part), parts)
  out = out.reshape(-1, *out.shape[2:])
  return jnp.concatenate([out, function(*rest)]) if rest[0].shape[0] else out


def sum_parts(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], size: int) -> jax.Array:
  """Adds up the results for at most `size` images at a time."""
  if arrays[0].shape[0] <= size:
    return function(*arrays)
  parts, rest = _split(arrays, size)
  like = jax.eval_shape(function, *(x[0] for x in parts))
  zero = jnp.zeros(like.shape, like.dtype)
  total, _ = lax.scan(lambda total, part: (total + function(*part), None), zero, parts)
  return total + function(*rest) if rest[0].shape[0] else total
