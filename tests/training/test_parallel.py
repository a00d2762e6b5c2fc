"""The fully connected layers divided over eight devices are those of plain data parallelism."""

import re

import jax
import numpy as np
import pytest

from alexnet_flax import checkpoint
from alexnet_flax.errors import UsageError
from alexnet_flax.training import train
from alexnet_flax.training.experiment import build_experiment, lower_train_step
from tests.helpers import NARROW, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture(scope='module')
def narrow(data_dir):
  """The default network, with dropout and moving averages too; of ten classes eight devices share none."""
  return replace(
    NARROW,
    data={'data_dir': data_dir},
    optimizer={'ema_decay': 0.9, 'accumulate_steps': 2, 'schedule': 'constant'},
    total_steps=2,
  )


@pytest.fixture(scope='module')
def plain(narrow, tmp_path_factory):
  """The arrays after two and after four steps of plain data parallelism."""
  folder = tmp_path_factory.mktemp('plain')
  with jax.numpy_dtype_promotion('standard'):
    train.train(replace(narrow, total_steps=4, checkpoint_every_steps=2), folder)
  return [checkpoint.load_arrays(folder / 'checkpoints', step) for step in (2, 4)]


def assert_equal(arrays, others):
  """Within rounding; of momentum, in which gradients of both signs add up, within twice that."""
  assert arrays.keys() == others.keys()
  for name, array in arrays.items():
    share = 2e-5 if '/trace/' in name else 1e-5
    np.testing.assert_allclose(others[name], array, atol=share * np.abs(array).max() + 1e-12, err_msg=name)


@pytest.mark.parametrize('model', [8, 2])
def test_it_is_data_parallelism_and_each_goes_on_with_the_others_checkpoint(narrow, plain, tmp_path, model):
  divided = replace(narrow, mesh={'model': model})
  train.train(divided, tmp_path / 'divided')
  assert_equal(plain[0], checkpoint.load_arrays(tmp_path / 'divided' / 'checkpoints', 2))
  if model == 8:
    train.train(replace(narrow, total_steps=4), tmp_path / 'divided')
    assert_equal(plain[1], checkpoint.load_arrays(tmp_path / 'divided' / 'checkpoints', 4))


def summed_values(config):
  """How many values the devices add up in a step, of the layers' parameters."""
  run = build_experiment(config)
  like = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), run.state, run.steps.state
  )
  text = lower_train_step(run, like).compile().as_text()
  total = 0
  for shapes in re.findall(r'= (.*) all-reduce(?:-start)?\(', text):
    for dimensions in re.findall(r'f32\[([\d,]*)\]', shapes):
      total += int(np.prod([int(side) for side in dimensions.split(',') if side]))
  dense = [
    leaf.size for name, layer in run.state.params.items() if name.startswith('fc') for leaf in layer.values()
  ]
  return total, sum(dense)


def test_gradients_of_divided_layers_are_not_summed(narrow):
  config = replace(narrow, optimizer={'accumulate_steps': 1, 'ema_decay': None})
  of_data, dense = summed_values(config)
  assert of_data > dense
  of_both, _ = summed_values(replace(config, mesh={'model': 8}))
  assert of_both < of_data - 0.9 * dense


def test_a_mesh_that_does_not_divide_the_devices(narrow):
  with pytest.raises(
    UsageError, match=r'mesh.model \(=3\) must divide the number of devices \(=8\): 1, 2, 4, 8'
  ):
    build_experiment(replace(narrow, mesh={'model': 3}))
