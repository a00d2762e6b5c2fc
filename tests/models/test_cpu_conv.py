"""Convolutions on CPUs: exact matrices, JAX's own results and derivatives, and no trace of them elsewhere."""

import functools
from fractions import Fraction

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_flax import VARIANTS
from alexnet_flax.models import cpu_conv, winograd
from alexnet_flax.models.cpu_conv import convolve, fast, fastest
from alexnet_flax.models.spec import Conv, Pool, output_side, window_padding
from alexnet_flax.models.winograd import Geometry, cook_toom, tiles

HALF = Fraction(1, 2)

filtered = jax.jit(functools.partial(fast, algorithm='filtering'), static_argnames=('kind', 'geometry'))
reference = jax.jit(cpu_conv.reference, static_argnames=('kind', 'geometry'))


@pytest.mark.parametrize(
  ('outputs', 'taps', 'points'),
  [
    (2, 3, (0, 1, -1, None)),
    (4, 3, (0, 1, -1, HALF, -2, None)),
    (4, 5, (0, 1, -1, HALF, -HALF, 2, -2, None)),
    (3, 2, (5, 0, None, Fraction(-1, 3))),
  ],
)
def test_cook_toom_filters_exactly(outputs, taps, points):
  after, kernel, before = cook_toom(outputs, taps, points)
  count = outputs + taps - 1
  for tap in range(taps):
    for place in range(count):
      products = [kernel[n][tap] * before[n][place] for n in range(count)]
      filtered = [sum(a * p for a, p in zip(row, products, strict=True)) for row in after]
      assert filtered == [place == output + tap for output in range(outputs)]


def test_lavin_and_grays_smallest_matrices():
  """F(2, 3) of the paper, but for the factors 2 that a row of B^T and one of G share, and for signs."""
  after, kernel, before = cook_toom(2, 3, (0, 1, -1, None))
  assert [[abs(x) for x in row] for row in after] == [[1, 1, 1, 0], [0, 1, 1, 1]]
  for ours, theirs in zip(before, [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], strict=True):
    factor = max(ours, key=abs)
    assert [abs(x / factor) for x in ours] == [abs(x) for x in theirs]
  assert {abs(x) / max(map(abs, row)) for row in kernel for x in row} == {0, 1}


def test_points_must_differ():
  with pytest.raises(ValueError, match='must be 4 different ones'):
    cook_toom(2, 3, (0, 1, 1, None))


def convolutions():
  """Each geometry of the variants once, with the most channels."""
  found = {}
  for spec in VARIANTS.values():
    side, channels = spec.image_size, 3
    for layer in spec.layers:
      if isinstance(layer, Conv):
        pads = window_padding(layer, side)
        geometry = Geometry(
          (side, side), (layer.kernel_size,) * 2, (layer.strides,) * 2, (pads, pads), layer.groups
        )
        old = found.get(geometry, (0, 0))
        found[geometry] = (max(channels, old[0]), max(layer.features, old[1]))
        channels = layer.features
      if isinstance(layer, Conv | Pool):
        side = output_side(layer, side)
  return found.items()


def arrays(geometry, images, inputs, features):
  rng = np.random.default_rng(0)
  x = np.maximum(rng.normal(size=(images, *geometry.image, inputs)), 0)
  kernel = rng.normal(size=(*geometry.kernel, inputs // geometry.groups, features))
  cotangent = rng.normal(size=(images, *geometry.output, features))
  return [jnp.asarray(array, jnp.float32) for array in (x, kernel, cotangent)]


def error(geometry, images, inputs, features, ways):
  """The greatest difference to JAX's own convolution, as a share of the greatest value."""
  x, kernel, cotangent = arrays(geometry, images, inputs, features)
  operands = {'output': (x, kernel), 'input': (cotangent, kernel), 'kernel': (x, cotangent)}

  def of(operands, algorithm, kind):
    found = fast(*operands, kind=kind, geometry=geometry, algorithm=algorithm)
    expected = reference(*operands, kind=kind, geometry=geometry)
    return jnp.abs(found - expected).max() / jnp.abs(expected).max()

  return max(
    map(float, jax.jit(lambda operands: [of(operands[kind], *way, kind) for *way, kind in ways])(operands))
  )


@pytest.mark.parametrize(('geometry', 'channels'), convolutions())
def test_every_convolution_of_the_variants(geometry, channels):
  assert error(geometry, 1, *channels, ways(geometry)) <= 2e-5


def ways(geometry):
  """Every algorithm, and what of a convolution it can compute."""
  kinds = ('output', 'input', 'kernel')
  algorithms = {'blocks': ('output', 'kernel') if cpu_conv._blocks(geometry) == (3, 3) else ('kernel',)}
  if geometry.strides == (1, 1) and geometry.kernel in cpu_conv._LEAST:
    algorithms['filtering'] = kinds
  if geometry.strides == (1, 1) and 0 not in geometry.output:
    algorithms['pairs'] = ('output',)
  if geometry.strides == (1, 1) and cpu_conv._is_small(geometry):
    algorithms['dense'] = kinds
  return [(algorithm, kind) for algorithm, kinds in algorithms.items() for kind in kinds]


@pytest.mark.parametrize(
  ('image', 'kernel', 'strides', 'padding', 'groups'),
  [
    ((5, 9), (3, 3), (1, 1), ((1, 1), (0, 2)), 1),
    ((7, 6), (5, 5), (1, 1), ((2, 2), (4, 0)), 2),
    ((11, 3), (3, 3), (1, 1), ((0, 0), (0, 0)), 3),
    ((19, 23), (11, 11), (4, 4), ((3, 4), (0, 0)), 1),
    ((20, 15), (7, 5), (3, 4), ((2, 1), (2, 5)), 1),
    ((14, 9), (7, 5), (2, 2), ((3, 2), (1, 0)), 1),
    ((13, 8), (2, 3), (3, 2), ((0, 1), (1, 1)), 2),
    ((2, 6), (3, 11), (1, 1), ((1, 1), (5, 3)), 1),
    ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1)), 2),
    ((4, 3), (5, 5), (1, 1), ((2, 2), (3, 1)), 1),
    ((1, 2), (3, 3), (1, 1), ((2, 0), (2, 3)), 3),
    ((9, 12), (3, 3), (1, 1), ((-1, -1), (-2, 0)), 1),
    ((9, 6), (3, 3), (1, 1), ((3, 3), (5, 4)), 1),
    ((13, 13), (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
  ],
)
@pytest.mark.parametrize(('images', 'in_parts'), [(5, False), (5, True), (20, True)])
def test_odd_sizes_groups_parts_and_sheets(
  image, kernel, strides, padding, groups, images, in_parts, monkeypatch
):
  """Also one image after the other, or 2 of 5 with one left over, and two images to a side."""
  geometry = Geometry(image, kernel, strides, padding, groups)
  if in_parts:
    monkeypatch.setattr(cpu_conv, '_CACHED', 1)
    monkeypatch.setattr(winograd, '_at_once', lambda geometry, inputs, features: 2)
  assert error(geometry, images, 6, 12, ways(geometry)) <= 1e-5


@pytest.mark.parametrize('padding', [((2, 2), (2, 2)), ((0, 3), (1, 0)), ((-1, -1), (0, -2))])
@pytest.mark.parametrize('in_parts', [False, True])
def test_the_kernel_of_few_inputs_at_stride_one(padding, in_parts, monkeypatch):
  """By blocks of one value each, also one image after the other."""
  if in_parts:
    monkeypatch.setattr(cpu_conv, '_CACHED', 1)
  assert error(Geometry((9, 12), (5, 3), (1, 1), padding, 1), 3, 3, 16, [('blocks', 'kernel')]) <= 1e-5


OPTIONS = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': 1}
GEOMETRY = Geometry((6, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), 1)


def ours(x, kernel):
  return convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)


def theirs(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)


@pytest.fixture
def always(monkeypatch):
  """As if there were one device, and the convolution large."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(cpu_conv, 'fastest', lambda *arguments: 'filtering')


def operations(function, *arguments, platform='cpu'):
  text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
  return text.count('stablehlo.convolution'), text.count('stablehlo.dot_general')


def loss(convolution):
  return lambda x, kernel: jnp.square(convolution(x, kernel)).sum()


TRANSFORMED = {
  'value': lambda f: f,
  'jvp': lambda f: lambda x, kernel: jax.jvp(f, (x, kernel), (kernel[:1, :1, :1, :1] * x, kernel)),
  'gradient': lambda f: jax.grad(loss(f), (0, 1)),
  'gradient of gradient': lambda f: jax.grad(
    lambda x, kernel: sum(jnp.square(g).sum() for g in jax.grad(loss(f), (0, 1))(x, kernel)), (0, 1)
  ),
  'hessian product': lambda f: lambda x, kernel: jax.jvp(jax.grad(loss(f), (0, 1)), (x, kernel), (x, kernel)),
  'per example': lambda f: lambda x, kernel: jax.vmap(jax.grad(loss(f), 1), (0, None))(x[:, None], kernel),
  'checkpoint': lambda f: jax.grad(jax.checkpoint(loss(f)), (0, 1)),
}


@pytest.mark.parametrize('name', TRANSFORMED)
def test_derivatives_and_maps(name, always):
  x, kernel, _ = arrays(GEOMETRY, 3, 4, 5)
  x /= 4
  found, expected = (jax.jit(TRANSFORMED[name](f))(x, kernel) for f in (ours, theirs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(b).max()), found, expected)


@pytest.mark.parametrize(
  ('algorithm', 'geometry', 'channels'),
  [
    ('filtering', Geometry((4, 5), (5, 5), (1, 1), ((2, 2), (2, 2)), 1), (32, 48)),
    ('blocks', Geometry((23, 21), (11, 11), (4, 4), ((2, 2), (2, 2)), 1), (3, 64)),
    ('pairs', Geometry((6, 7), (5, 3), (1, 1), ((2, 1), (0, 2)), 1), (3, 16)),
    ('dense', Geometry((2, 3), (3, 5), (1, 1), ((1, 1), (2, 2)), 1), (5, 6)),
  ],
)
def test_what_is_fastest_is_computed(algorithm, geometry, channels, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(cpu_conv, '_LEAST_OUTPUTS', 1)
  assert fastest('output', geometry, 40, *channels) == algorithm
  assert fastest('kernel', geometry, 40, *channels) == ('blocks' if algorithm == 'pairs' else algorithm)
  x, kernel, _ = arrays(geometry, 40, *channels)

  def gradient(convolution):
    def total(x, kernel):
      return jnp.sin(convolution(x / 9, kernel / 9, geometry.strides, geometry.padding, **OPTIONS)).sum()

    return jax.jit(jax.grad(total, (0, 1)))(x, kernel)

  found, expected = gradient(convolve), gradient(jax.lax.conv_general_dilated)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * jnp.abs(b).max()), found, expected)


@pytest.mark.parametrize('inputs', [0, 8])
@pytest.mark.parametrize('image', [(1, 1), (1, 40), (3, 3)])
def test_nothing_to_compute_with(image, inputs, monkeypatch):
  """No channels, or a kernel that is larger than the image, by more than one too."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(cpu_conv, '_LEAST_OUTPUTS', 1)
  x, kernel = jnp.ones((16, *image, inputs)), jnp.ones((3, 3, inputs, 16))
  found, expected = (
    f(x, kernel, (1, 1), ((0, 0), (0, 0)), **OPTIONS) for f in (convolve, jax.lax.conv_general_dilated)
  )
  np.testing.assert_array_equal(found, expected)


def test_outside_of_jit(always):
  x, kernel, _ = arrays(GEOMETRY, 1, 2, 3)
  np.testing.assert_allclose(ours(x, kernel), theirs(x, kernel), rtol=1e-5, atol=1e-5)


def test_gpus_and_tpus_keep_their_convolutions(always):
  x, kernel, _ = arrays(GEOMETRY, 2, 4, 4)
  gradient = jax.grad(loss(ours), (0, 1))
  assert operations(gradient, x, kernel)[0] == 0
  for platform in ('cuda', 'rocm', 'tpu'):
    assert operations(gradient, x, kernel, platform=platform) == (3, 0)
  exported = jax.export.export(jax.jit(ours), platforms=('cpu', 'cuda', 'tpu'))(x, kernel)
  again = jax.export.deserialize(exported.serialize())
  np.testing.assert_allclose(again.call(x, kernel), theirs(x, kernel), rtol=1e-5, atol=1e-4)


def test_what_jax_computes_itself(always, monkeypatch):
  """Other types, sizes that are not known yet, explicit and manual axes, more devices."""
  x, kernel, _ = arrays(GEOMETRY, 2, 4, 4)
  assert operations(ours, x, kernel)[0] == 0
  assert operations(ours, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == (1, 0)
  (size,) = jax.export.symbolic_shape('b')
  exported = jax.export.export(jax.jit(ours))(jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), kernel)
  assert 'dot_general' not in exported.mlir_module()
  explicit = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Explicit,))
  assert operations(ours, jax.device_put(x, NamedSharding(explicit, P('data'))), kernel) == (1, 0)
  auto = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
  manual = jax.shard_map(ours, mesh=auto, in_specs=(P('data'), P()), out_specs=P('data'))
  assert operations(manual, x, kernel) == (1, 0)
  assert operations(ours, jax.device_put(x, NamedSharding(auto, P('data'))), kernel)[0] == 0
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  jax.clear_caches()
  assert operations(ours, x, kernel) == (1, 0)


SHEETS = Geometry((13, 13), (3, 3), (1, 1), ((1, 1), (1, 1)), 1)


def test_sheets_of_four_images_have_fewer_tiles():
  assert [tiles(SHEETS.sheet(count)) for count in (1, 2)] == [(4, 4), (7, 7)]

  def products(images):
    x, kernel, _ = arrays(SHEETS, images, 8, 8)
    return str(jax.make_jaxpr(functools.partial(filtered, kind='output', geometry=SHEETS))(x, kernel))

  assert 'f32[36,1,7,7,8]' in products(4)
  assert 'f32[36,5,4,4,8]' in products(5)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 3e38, 2e38, 1e6, 0, 1e-30])
@pytest.mark.parametrize('kind', ['output', 'input'])
def test_an_image_does_not_reach_the_others(kind, value):
  """They differ by rounding alone."""
  x, kernel, _ = arrays(SHEETS, 4, 8, 8)
  changed = x.at[0].set(value)
  before, after = (filtered(each, kernel, kind=kind, geometry=SHEETS) for each in (x, changed))
  np.testing.assert_allclose(before[1:], after[1:], rtol=0, atol=1e-5 * jnp.abs(before[1:]).max())
  expected = reference(changed, kernel, kind=kind, geometry=SHEETS)[0]
  assert jnp.isfinite(after[0]).all() == jnp.isfinite(expected).all()
  assert value != 0 or (after[0] == 0).all()


@pytest.mark.parametrize('scale', [0, 1e-30, 1e-6, 1, 1e6, 1e30])
@pytest.mark.parametrize('case', ['output', 'input', 'kernel', 'kernel, one image alone'])
def test_images_of_a_sheet_are_as_exact_as_alone(case, scale):
  """The greatest error of each image, or of the kernel's derivative, also where three have no part in it."""
  x, kernel, cotangent = arrays(SHEETS, 4, 8, 8)
  x, kind = x.at[1:].multiply(scale), case.partition(',')[0]
  if case != kind:
    cotangent = cotangent.at[1:].set(0)
  other = cotangent if kind == 'kernel' else kernel
  found, expected = (f(x, other, kind=kind, geometry=SHEETS) for f in (filtered, reference))
  axes = tuple(range(4)) if kind == 'kernel' else (1, 2, 3)
  assert (jnp.abs(found - expected).max(axes) <= 1e-5 * jnp.abs(expected).max(axes)).all()


@pytest.mark.parametrize('greatest', [1.3e38, 1.6e38, 2.5e38, 3.3e38])
def test_the_greatest_values_are_not_lost(greatest):
  x, kernel, _ = arrays(SHEETS, 4, 8, 8)
  x, kernel = x * (greatest / x.max()), kernel * 1e-3
  found, expected = (f(x, kernel, kind='output', geometry=SHEETS) for f in (filtered, reference))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_derivative(value):
  x, _, cotangent = arrays(SHEETS, 4, 8, 8)
  assert not jnp.isfinite(filtered(x.at[1, 5, 5].set(value), cotangent, kind='kernel', geometry=SHEETS)).any()


def test_the_table():
  """JAX's own convolution was faster with few channels, few tiles, and much waste in the last tile."""

  def chosen(side, taps, images, inputs, features, groups=1):
    pads = ((taps // 2, taps // 2),) * 2
    geometry = Geometry((side, side), (taps, taps), (1, 1), pads, groups)
    return [fastest(kind, geometry, images, inputs, features) for kind in ('output', 'input', 'kernel')]

  for large in [(13, 3, 32, 256, 384), (13, 3, 1, 192, 192, 2), (13, 3, 8, 64, 64), (4, 5, 128, 64, 192)]:
    assert chosen(*large) == ['filtering'] * 3, large
  for other in [(13, 3, 1, 256, 384), (13, 3, 4, 64, 64), (13, 3, 32, 48, 384), (6, 3, 32, 128, 128)]:
    assert chosen(*other) == [None] * 3, other
  assert chosen(13, 1, 32, 256, 384) == [None] * 3
  for small in [(2, 3, 128, 384, 256), (1, 3, 16, 8, 8), (4, 5, 32, 16, 48)]:
    assert chosen(*small) == ['dense'] * 3, small
  assert chosen(2, 3, 8, 384, 256) == [None] * 3
  assert chosen(32, 5, 128, 3, 32) == ['pairs', None, 'blocks']
  assert chosen(32, 5, 128, 3, 12) == chosen(32, 5, 32, 3, 32) == ['pairs', None, None]
  for other in [(32, 5, 32, 4, 32), (32, 5, 32, 3, 48), (32, 1, 32, 3, 32)]:
    assert chosen(*other) == [None] * 3, other
  first = Geometry((224, 224), (11, 11), (4, 4), ((2, 2), (2, 2)), 1)
  for channels, expected in [((3, 64), ['blocks', None, 'blocks']), ((3, 48), [None, None, 'blocks'])]:
    assert [fastest(kind, first, 32, *channels) for kind in ('output', 'input', 'kernel')] == expected
  assert fastest('output', first, 32, 1, 64) is fastest('kernel', first, 1, 3, 64) is None


def test_the_same_bits_twenty_times():
  """On all threads, in several parts."""
  conv1 = Geometry((63, 63), (11, 11), (4, 4), ((2, 2), (2, 2)), 1)
  conv2 = Geometry((27, 27), (5, 5), (1, 1), ((2, 2), (2, 2)), 1)
  first, second = arrays(conv1, 40, 3, 16), arrays(conv2, 3, 48, 64)

  @jax.jit
  def step(first, second):
    x, kernel, cotangent = second
    return (
      fast(first[0], first[2], kind='kernel', geometry=conv1, algorithm='blocks'),
      filtered(x, kernel, kind='output', geometry=conv2),
      filtered(cotangent, kernel, kind='input', geometry=conv2),
      filtered(x, cotangent, kind='kernel', geometry=conv2),
    )

  runs = [b''.join(np.asarray(a).tobytes() for a in step(first, second)) for _ in range(20)]
  assert set(runs) == {runs[0]}
