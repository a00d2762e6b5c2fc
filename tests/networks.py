"""Networks with random weights of a size at which every layer's values are of the order of one."""

import numpy as np

from alexnet_flax.weights.layout import variable_shapes, variables_of


def random_variables(spec, num_classes=None, seed=0):
  """Variables as a trained network has them: no bias, scale or statistic is at its start."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in variable_shapes(spec, num_classes).items():
    values = rng.normal(size=shape)
    match name.rpartition('/')[2]:
      case 'kernel':
        values *= (2 / np.prod(shape[:-1])) ** 0.5 / _input_deviation(spec, name)
      case 'var':
        values = (0.5 + np.abs(values)) * _input_deviation(spec, name) ** 2
      case 'scale':
        values = 1 + 0.1 * values
      case _:
        values *= 0.1
    tensors[name] = values.astype(np.float32)
  return variables_of(tensors)


def _input_deviation(spec, name):
  """Pixels in 0..255 are some 60 times as large as what layers hand on."""
  bare = spec.preprocessing.scale == 1 and spec.preprocessing.std[0] == 1
  first = 'norm0' if any('norm0' in one for one in variable_shapes(spec)) else 'conv1'
  return 60.0 if bare and f'/{first}/' in name else 1.0
