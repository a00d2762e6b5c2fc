"""Every endpoint of every variant at full size, against tables derived by hand from the literature."""

import functools

import jax
import jax.numpy as jnp
import pytest

from alexnet_flax import VARIANTS, AlexNet


def stage(number, side, channels, layers, pooled=None):
  """Rows of one convolution stage: {'conv1': (56, 56, 96), 'norm1a': ..., 'pool1': ...}."""
  names = [f'{name.rstrip("ab")}{number}{name[4:]}' for name in layers]
  rows = dict.fromkeys(names, (side, side, channels))
  return rows | ({f'pool{number}': (pooled, pooled, channels)} if pooled else {})


def dense(*names, size=4096):
  return dict.fromkeys(names, (size,))


TABLES = {
  'batchnorm': {
    **stage(1, 56, 96, ['conv', 'relu', 'norm'], 27),
    **stage(2, 27, 256, ['conv', 'relu', 'norm'], 13),
    **stage(3, 13, 384, ['conv', 'relu', 'norm']),
    **stage(4, 13, 384, ['conv', 'relu', 'norm']),
    **stage(5, 13, 256, ['conv', 'relu', 'norm'], 6),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'batchnorm_prose': {
    **stage(1, 57, 96, ['conv', 'relu', 'norma', 'normb'], 29),
    **stage(2, 29, 256, ['conv', 'relu', 'norma', 'normb'], 15),
    **stage(3, 15, 384, ['conv', 'relu', 'norma', 'normb'], 8),
    **stage(4, 8, 384, ['conv', 'relu', 'norma', 'normb'], 4),
    **stage(5, 4, 256, ['conv', 'relu', 'norma', 'normb'], 2),
    'flatten': (1024,),
    'norm5c': (1024,),
    **dense('fc6', 'relu6', 'norm6', 'drop6', 'fc7', 'relu7', 'norm7', 'drop7'),
    'fc8': (1000,),
  },
  'paper': {
    **stage(1, 55, 96, ['conv', 'relu', 'norm'], 27),
    **stage(2, 27, 256, ['conv', 'relu', 'norm'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 384, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv', 'relu'], 6),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'original_code': {
    **stage(1, 55, 96, ['conv', 'norm', 'relu'], 27),
    'relu1': (27, 27, 96),
    **stage(2, 27, 256, ['conv', 'relu', 'norma', 'normb'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 384, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv'], 6),
    'relu5': (6, 6, 256),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'caffe': {
    **stage(1, 55, 96, ['conv', 'relu', 'norm'], 27),
    **stage(2, 27, 256, ['conv', 'relu', 'norm'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 384, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv', 'relu'], 6),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'caffenet': {
    **stage(1, 55, 96, ['conv', 'relu'], 27),
    'norm1': (27, 27, 96),
    **stage(2, 27, 256, ['conv', 'relu'], 13),
    'norm2': (13, 13, 256),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 384, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv', 'relu'], 6),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'one_weird_trick': {
    **stage(1, 55, 64, ['conv', 'norm'], 27),
    'relu1': (27, 27, 64),
    **stage(2, 27, 192, ['conv', 'relu', 'norm'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 256, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv'], 6),
    'relu5': (6, 6, 256),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'torchvision': {
    **stage(1, 55, 64, ['conv', 'relu'], 27),
    **stage(2, 27, 192, ['conv', 'relu'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 256, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv', 'relu'], 6),
    'flatten': (9216,),
    'drop5': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7'),
    'fc8': (1000,),
  },
  'batchnorm_grouped': {
    'norm0': (227, 227, 3),
    **stage(1, 55, 96, ['conv', 'norm', 'relu'], 27),
    **stage(2, 27, 256, ['conv', 'norm', 'relu'], 13),
    **stage(3, 13, 384, ['conv', 'norm', 'relu']),
    **stage(4, 13, 384, ['conv', 'norm', 'relu']),
    **stage(5, 13, 256, ['conv', 'norm', 'relu'], 6),
    'flatten': (9216,),
    **dense('fc6', 'norm6', 'relu6', 'fc7', 'norm7', 'relu7'),
    'fc8': (1000,),
  },
  'ungrouped': {
    **stage(1, 54, 96, ['conv', 'relu', 'norm'], 27),
    **stage(2, 27, 256, ['conv', 'relu', 'norm'], 13),
    **stage(3, 13, 384, ['conv', 'relu']),
    **stage(4, 13, 384, ['conv', 'relu']),
    **stage(5, 13, 256, ['conv', 'relu'], 6),
    'flatten': (9216,),
    **dense('fc6', 'relu6', 'drop6', 'fc7', 'relu7', 'drop7'),
    'fc8': (1000,),
  },
  'cifar10_full': {
    **stage(1, 32, 32, ['conv', 'relu'], 16),
    'norm1': (16, 16, 32),
    **stage(2, 16, 32, ['conv', 'relu'], 8),
    'norm2': (8, 8, 32),
    **stage(3, 8, 64, ['conv', 'relu'], 4),
    'flatten': (1024,),
    'fc4': (10,),
  },
  'cifar10_80sec': {
    **stage(1, 32, 32, ['conv', 'relu'], 16),
    **stage(2, 16, 32, ['conv', 'relu'], 8),
    **stage(3, 8, 64, ['conv', 'relu'], 4),
    'flatten': (1024,),
    'fc4': (64,),
    'relu4': (64,),
    'fc5': (10,),
  },
  'cifar10_four_convs': {
    **stage(1, 16, 32, ['conv', 'relu']),
    **stage(2, 16, 32, ['conv', 'relu'], 8),
    **stage(3, 8, 64, ['conv', 'relu']),
    **stage(4, 8, 64, ['conv', 'relu'], 4),
    'flatten': (1024,),
    'fc5': (10,),
  },
  'cifar10_local': {
    **stage(1, 24, 64, ['conv', 'relu'], 12),
    **stage(2, 12, 64, ['conv', 'relu'], 6),
    **stage(3, 6, 32, ['conv', 'relu']),
    **stage(4, 6, 32, ['conv', 'relu']),
    'flatten': (1152,),
    'fc5': (10,),
  },
  'cifar10_local_lrn': {
    **stage(1, 24, 64, ['conv', 'relu'], 12),
    'norm1': (12, 12, 64),
    **stage(2, 12, 64, ['conv', 'relu', 'norm'], 6),
    **stage(3, 6, 64, ['conv', 'relu']),
    **stage(4, 6, 32, ['conv', 'relu']),
    'flatten': (1152,),
    'fc5': (10,),
  },
  'cifar10_alexnet': {
    **stage(1, 8, 64, ['conv', 'relu'], 4),
    **stage(2, 4, 192, ['conv', 'relu'], 2),
    **stage(3, 2, 384, ['conv', 'relu']),
    **stage(4, 2, 256, ['conv', 'relu']),
    **stage(5, 2, 256, ['conv', 'relu'], 1),
    'flatten': (256,),
    'fc6': (10,),
  },
  'cifar10_small_alexnet': {
    **stage(1, 28, 64, ['conv', 'relu'], 14),
    'norm1': (14, 14, 64),
    **stage(2, 14, 64, ['conv', 'relu'], 7),
    'norm2': (7, 7, 64),
    'flatten': (3136,),
    'fc3': (384,),
    'relu3': (384,),
    'fc4': (192,),
    'relu4': (192,),
    'fc5': (10,),
  },
}

# The layer orders in which easily confused variants differ.
ORDERS = {
  'paper': ['conv1', 'relu1', 'norm1', 'pool1', 'conv2', 'relu2', 'norm2', 'pool2'],
  'original_code': ['conv1', 'norm1', 'pool1', 'relu1', 'conv2', 'relu2', 'norm2a', 'norm2b', 'pool2'],
  'caffe': ['conv1', 'relu1', 'norm1', 'pool1', 'conv2', 'relu2', 'norm2', 'pool2'],
  'caffenet': ['conv1', 'relu1', 'pool1', 'norm1', 'conv2', 'relu2', 'pool2', 'norm2'],
  'one_weird_trick': ['conv1', 'norm1', 'pool1', 'relu1', 'conv2', 'relu2', 'norm2', 'pool2'],
  'batchnorm_grouped': ['norm0', 'conv1', 'norm1', 'relu1', 'pool1', 'conv2', 'norm2', 'relu2', 'pool2'],
  'cifar10_local_lrn': ['conv1', 'relu1', 'pool1', 'norm1', 'conv2', 'relu2', 'norm2', 'pool2'],
}

# Parameters and BatchNorm statistics at the variant's own size, as published or counted by its framework.
COUNTS = {
  'batchnorm': (62_381_096, 2_752),
  'batchnorm_prose': (28_845_096, 21_184),
  'paper': (60_965_224, 0),
  'original_code': (60_965_224, 0),
  'caffe': (60_965_224, 0),
  'caffenet': (60_965_224, 0),
  'one_weird_trick': (61_100_840, 0),
  'torchvision': (61_100_840, 0),
  'batchnorm_grouped': (60_965_230, 19_142),
  'ungrouped': (62_378_344, 0),
  'cifar10_full': (89_578, 0),
  'cifar10_80sec': (145_578, 0),
  'cifar10_four_convs': (77_354, 0),
  'cifar10_local': (1_116_490, 0),
  'cifar10_local_lrn': (2_112_970, 0),
  'cifar10_alexnet': (2_472_266, 0),
  'cifar10_small_alexnet': (1_387_786, 0),
}
KERNELS = {
  'batchnorm': {'conv1': (11, 11, 3, 96), 'conv2': (5, 5, 96, 256), 'fc6': (9216, 4096)},
  'batchnorm_prose': {'conv1': (11, 11, 3, 96), 'conv5': (3, 3, 384, 256), 'fc6': (1024, 4096)},
  'paper': {
    'conv2': (5, 5, 48, 256),
    'conv3': (3, 3, 256, 384),
    'conv4': (3, 3, 192, 384),
    'fc6': (9216, 4096),
  },
  'original_code': {'conv2': (5, 5, 48, 256), 'conv3': (3, 3, 256, 384), 'conv5': (3, 3, 192, 256)},
  'caffe': {'conv2': (5, 5, 48, 256), 'conv4': (3, 3, 192, 384), 'fc6': (9216, 4096)},
  'caffenet': {'conv2': (5, 5, 48, 256), 'conv4': (3, 3, 192, 384), 'fc6': (9216, 4096)},
  'one_weird_trick': {'conv2': (5, 5, 64, 192), 'conv4': (3, 3, 384, 256), 'fc6': (9216, 4096)},
  'torchvision': {'conv1': (11, 11, 3, 64), 'conv5': (3, 3, 256, 256), 'fc7': (4096, 4096)},
  'batchnorm_grouped': {'conv2': (5, 5, 48, 256), 'conv5': (3, 3, 192, 256), 'fc6': (9216, 4096)},
  'ungrouped': {'conv2': (5, 5, 96, 256), 'conv5': (3, 3, 384, 256), 'fc6': (9216, 4096)},
  'cifar10_full': {'conv1': (5, 5, 3, 32), 'conv3': (5, 5, 32, 64), 'fc4': (1024, 10)},
  'cifar10_80sec': {'conv1': (5, 5, 3, 32), 'fc4': (1024, 64), 'fc5': (64, 10)},
  'cifar10_four_convs': {'conv2': (3, 3, 32, 32), 'conv4': (3, 3, 64, 64), 'fc5': (1024, 10)},
  'cifar10_local': {'conv2': (5, 5, 64, 64), 'conv3': (6, 6, 3, 3, 64, 32), 'fc5': (1152, 10)},
  'cifar10_local_lrn': {'conv3': (6, 6, 3, 3, 64, 64), 'conv4': (6, 6, 3, 3, 64, 32)},
  'cifar10_alexnet': {'conv1': (11, 11, 3, 64), 'conv4': (3, 3, 384, 256), 'fc6': (256, 10)},
  'cifar10_small_alexnet': {'conv2': (5, 5, 64, 64), 'fc3': (3136, 384), 'fc5': (192, 10)},
}
# By hand, backwards from one value after pool5. A pool needs 3 values; the pool before it makes 3 of 7, or of
# 6 if sizes are rounded up. conv1 makes 12 values of 55, or of 52 if rounded up.
SMALLEST = {
  'batchnorm': 57,
  'batchnorm_prose': 1,
  'paper': 63,
  'original_code': 52,
  'caffe': 55,
  'caffenet': 55,
  'one_weird_trick': 52,
  'torchvision': 63,
  'batchnorm_grouped': 55,
  'ungrouped': 55,
  'cifar10_full': 12,
  'cifar10_80sec': 12,
  'cifar10_four_convs': 11,
  'cifar10_local': 6,
  'cifar10_local_lrn': 6,
  'cifar10_alexnet': 29,
  'cifar10_small_alexnet': 6,
}


@functools.cache
def abstract(name, dtype=jnp.float32):
  spec = VARIANTS[name]
  model = AlexNet(spec, dtype=dtype)
  images = jax.ShapeDtypeStruct((2, spec.image_size, spec.image_size, 3), jnp.float32)
  init = functools.partial(model.init_with_output, train=False, endpoints=True)
  (logits, taps), variables = jax.eval_shape(init, jax.random.key(0), images)
  return variables, logits, taps


@pytest.mark.parametrize('table', [TABLES, COUNTS, KERNELS, SMALLEST])
def test_every_variant_is_in_the_tables(table):
  assert set(table) == set(VARIANTS)


@pytest.mark.parametrize('name', VARIANTS)
def test_endpoints(name):
  _, logits, taps = abstract(name)
  assert {key: tap.shape for key, tap in taps.items()} == {
    key: (2, *shape) for key, shape in TABLES[name].items()
  }
  assert logits.shape == (2, VARIANTS[name].num_classes)


@pytest.mark.parametrize('name', ORDERS)
def test_order(name):
  assert [key for key, _ in VARIANTS[name].named_layers()][: len(ORDERS[name])] == ORDERS[name]


@pytest.mark.parametrize('name', VARIANTS)
def test_parameter_counts(name):
  variables, _, _ = abstract(name)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert (count(variables['params']), count(variables.get('batch_stats', {}))) == COUNTS[name]
  for layer, shape in KERNELS[name].items():
    assert variables['params'][layer]['kernel'].shape == shape


@pytest.mark.parametrize('name', VARIANTS)
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
  with jax.numpy_dtype_promotion('standard'):  # nn.BatchNorm mixes types
    variables, logits, taps = abstract(name, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert logits.dtype == taps[VARIANTS[name].head].dtype == jnp.float32
  others = {tap.dtype for key, tap in taps.items() if key != VARIANTS[name].head}
  assert others == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', VARIANTS)
def test_smallest_image(name):
  spec = VARIANTS[name]
  smallest = spec.smallest_image_size()
  assert smallest == SMALLEST[name]
  spec.check_image_size(smallest, smallest)
  if smallest > 1:
    with pytest.raises(
      ValueError, match=f'too small for the network {name}.* at least {smallest}x{smallest}'
    ):
      spec.check_image_size(smallest, smallest - 1)


def test_images_need_not_be_square():
  model = AlexNet(VARIANTS['torchvision'].scaled(1 / 16))
  images = jax.ShapeDtypeStruct((1, 67, 131, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  assert variables['params']['fc6']['kernel'].shape == (1 * 3 * 16, 256)
