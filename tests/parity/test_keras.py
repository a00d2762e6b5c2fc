"""Keras running AlexNet with batch normalization: every endpoint, every gradient, and a step of SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from alexnet_flax import (
  VARIANTS,
  AlexNet,
  create_train_state,
  cross_entropy,
  load_weights,
  save_weights,
  sgd,
  train_step,
)
from alexnet_flax.export import parity
from alexnet_flax.models.spec import Activation, Dropout, Pool
from alexnet_flax.weights import open_weights
from alexnet_flax.weights.keras import keras_taps, tensor_names
from alexnet_flax.weights.layout import tensors_of
from tests.helpers import random_variables

keras = pytest.importorskip('keras', reason='Keras is not installed')
tf = pytest.importorskip('tensorflow', reason='TensorFlow is not installed')
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')

LABELS = np.array([3, 700])


def keras_model(dropout=0.5, width=1.0):
  """The Keras model of the tutorial that `batchnorm` follows, as its code builds it."""
  layers = keras.layers
  narrow = lambda features: round(width * features)  # noqa: E731
  return keras.Sequential(
    [
      layers.Input((224, 224, 3)),
      layers.Conv2D(narrow(96), (11, 11), (4, 4), padding='same', activation='relu'),
      layers.BatchNormalization(),
      layers.MaxPooling2D((3, 3), (2, 2)),
      layers.Conv2D(narrow(256), (5, 5), padding='same', activation='relu'),
      layers.BatchNormalization(),
      layers.MaxPooling2D((3, 3), (2, 2)),
      layers.Conv2D(narrow(384), (3, 3), padding='same', activation='relu'),
      layers.BatchNormalization(),
      layers.Conv2D(narrow(384), (3, 3), padding='same', activation='relu'),
      layers.BatchNormalization(),
      layers.Conv2D(narrow(256), (3, 3), padding='same', activation='relu'),
      layers.BatchNormalization(),
      layers.MaxPooling2D((3, 3), (2, 2)),
      layers.Flatten(),
      layers.Dense(narrow(4096), activation='relu'),
      layers.Dropout(dropout),
      layers.Dense(narrow(4096), activation='relu'),
      layers.Dropout(dropout),
      layers.Dense(1000, activation='softmax'),
    ]
  )


@pytest.fixture(scope='module')
def spec(sized):
  return sized(VARIANTS['batchnorm'])


@pytest.fixture(scope='module')
def variables(spec):
  return random_variables(spec)


def with_our_weights(spec, variables, folder, dtype='float32'):
  """Keras's model with our weights, as our exporter writes them."""
  path = folder / 'tutorial.weights.h5'
  save_weights(path, spec, variables)
  keras.config.set_dtype_policy(dtype)
  try:
    model = keras_model(dropout=0.0, width=spec.layers[0].features / 96)
  finally:
    keras.config.set_dtype_policy('float32')
  model.load_weights(path)
  return model


def test_the_count_and_keras_own_file(tmp_path):
  model = keras_model()
  assert model.count_params() == 62_383_848
  model.save(tmp_path / 'tutorial.keras')
  loaded = tensors_of(load_weights(tmp_path / 'tutorial.keras', VARIANTS['batchnorm']))
  assert sum(tensor.size for tensor in loaded.values()) == 62_383_848
  np.testing.assert_array_equal(loaded['params/conv4/kernel'], model.layers[8].kernel)


def test_every_endpoint(spec, variables, photographs, tmp_path, agree):
  network = with_our_weights(spec, variables, tmp_path)
  images = parity.network_inputs(spec, photographs).normalized
  theirs = keras_taps(network, spec, images)
  _, taps = AlexNet(spec).apply(variables, jnp.asarray(images), train=False, endpoints=True)
  assert {'conv1', 'relu1', 'norm1', 'flatten', 'fc8'} < set(theirs)
  errors = {name: parity.greatest_error(np.asarray(taps[name]), tap) for name, tap in theirs.items()}
  agree(f'Keras {keras.__version__}', 'batchnorm: every endpoint', errors)


def test_our_keras_file(spec, variables, photographs, tmp_path, agree):
  path = tmp_path / 'ours.keras'
  save_weights(path, spec, variables)
  program, errors = parity.compare(open_weights(path), spec, load_weights(path, spec), photographs)
  agree(program, 'batchnorm, a .keras file of ours: every endpoint', errors)


def test_elu_and_average_pools(spec, photographs, tmp_path, agree):
  spec = spec.replace(Activation, kind='elu').replace(Pool, kind='avg', padding='SAME')
  path, variables = tmp_path / 'ours.keras', random_variables(spec)
  save_weights(path, spec, variables)
  program, errors = parity.compare(open_weights(path), spec, load_weights(path, spec), photographs)
  agree(program, 'batchnorm with ELU and average pools, a .keras file of ours: every endpoint', errors)


def in_float64(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


# In float32 a gradient is no continuous function: where two values of a pool's window are equal to the last
# digit, or one is all but 0 before a ReLU, rounding decides where the whole gradient goes.
def test_every_gradient(spec, variables, photographs, tmp_path, agree):
  network = with_our_weights(spec, variables, tmp_path, 'float64')
  images = np.float64(parity.network_inputs(spec, photographs).normalized)
  with tf.GradientTape() as tape:
    tape.watch(pixels := tf.constant(images))
    losses = keras.losses.sparse_categorical_crossentropy(LABELS, network(pixels, training=False))
    loss = tf.reduce_mean(losses)
  *theirs, of_images = tape.gradient(loss, [*(v.value for v in network.trainable_variables), pixels])

  with jax.enable_x64(True):
    model, ours = AlexNet(spec, dtype=jnp.float64), in_float64(variables)

    def loss_of(params, images):
      logits = model.apply(ours | {'params': params}, images, train=False)
      return cross_entropy(logits, jnp.asarray(LABELS)).mean()

    gradients, pixels = jax.jit(jax.grad(loss_of, (0, 1)))(ours['params'], jnp.asarray(images))
  found = traverse_util.flatten_dict({'params': gradients}, sep='/')
  errors = {
    name: parity.greatest_error(np.asarray(found[name]), theirs.pop(0).numpy())
    for name in tensor_names(spec)
    if name.startswith('params/')
  }
  errors['images'] = parity.greatest_error(np.asarray(pixels), of_images.numpy())
  agree(
    f'Keras {keras.__version__}',
    'batchnorm: gradient of the cross entropy by every parameter and by the images, float64',
    errors,
  )


def test_one_whole_step(spec, variables, photographs, tmp_path, agree):
  """Parameters and BatchNorm's statistics after a step of SGD with momentum, dropout off."""
  network = with_our_weights(spec, variables, tmp_path, 'float64')
  images = np.float64(parity.network_inputs(spec, photographs).normalized)
  network.compile(keras.optimizers.SGD(0.01, momentum=0.9), 'sparse_categorical_crossentropy')
  before = [np.asarray(variable) for variable in network.weights]
  network.train_on_batch(images, LABELS)
  after = [np.asarray(variable) for variable in network.weights]

  model = AlexNet(spec.replace(Dropout, rate=0.0), dtype=jnp.float64)
  tx = sgd(0.01, momentum=0.9)
  state = create_train_state(model, tx, jax.random.key(0), (224, 224, 3))
  with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):  # nn.BatchNorm names float32 too
    ours = in_float64(variables)
    state = state.replace(**ours, opt_state=tx.init(ours['params']))
    batch = {'image': jnp.asarray(images), 'label': jnp.asarray(LABELS, jnp.int32), 'weight': jnp.ones(2)}
    state, _ = jax.jit(train_step)(state, batch, jax.random.key(1))
  new = traverse_util.flatten_dict({'params': state.params, 'batch_stats': state.batch_stats}, sep='/')
  # Against the change, not against the value: a step that does nothing would pass otherwise.
  errors = {
    name: parity.greatest_error(np.asarray(new[name]) - old, theirs - old)
    for name, old, theirs in zip(tensor_names(spec), before, after, strict=True)
  }
  agree(
    f'Keras {keras.__version__}',
    'batchnorm: change of all parameters and statistics by one step of SGD, float64',
    errors,
  )
