"""Throughput of the whole training step: ours, plain linen code, PyTorch and Keras.

  python benchmarks/train_step.py [--batch 32] [--network batchnorm] [--torch-python PATH]

All programs run the same network and batch in turn: float32, forward, backward and SGD with momentum, on
images in memory. PyTorch may be in another environment. The last line is one JSON object; a peer that is
not installed is null.
"""

import argparse
import functools
import json
import sys

CLASSES = 1000
SIZE = 224


def ours(network: str, batch: int):
  """This package's training step."""
  import jax
  import jax.numpy as jnp

  from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step

  model = AlexNet(VARIANTS[network])
  tx = sgd(0.01, spec=model.spec)
  state = create_train_state(model, tx, jax.random.key(0), (SIZE, SIZE, 3))
  key = jax.random.key(1)
  data = {
    'image': jax.random.normal(key, (batch, SIZE, SIZE, 3)),
    'label': jax.random.randint(key, (batch,), 0, CLASSES),
    'weight': jnp.ones(batch),
  }
  step = jax.jit(train_step, donate_argnums=0)

  def work(times: int) -> None:
    nonlocal state
    for _ in range(times):
      state, metrics = step(state, data, key)
    jax.block_until_ready((state, metrics))

  return work


def plain_linen(network: str, batch: int):
  """The usual code: linen's own layers, optax.sgd and a jitted step."""
  import jax
  import jax.numpy as jnp
  import optax
  from flax import linen as nn

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))

      def stage(x, features, size, strides=1, groups=1, padding='SAME', name='conv'):
        x = nn.Conv(features, (size, size), strides, padding, feature_group_count=groups)(x)
        x = nn.relu(x)
        return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3)(x) if normed else x

      normed = network == 'batchnorm'
      widths = (96, 256, 384, 384, 256) if normed else (64, 192, 384, 256, 256)
      x = pool(stage(x, widths[0], 11, 4, padding='SAME' if normed else [(2, 2), (2, 2)]))
      x = pool(stage(x, widths[1], 5))
      x = stage(stage(x, widths[2], 3), widths[3], 3)
      x = pool(stage(x, widths[4], 3)).reshape(x.shape[0], -1)
      for _ in range(2):
        if normed:
          x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4096)(x)))
        else:
          x = nn.relu(nn.Dense(4096)(nn.Dropout(0.5, deterministic=not train)(x)))
      return nn.Dense(CLASSES)(x)

  model = Plain()
  key = jax.random.key(0)
  images = jax.random.normal(key, (batch, SIZE, SIZE, 3))
  labels = jax.random.randint(key, (batch,), 0, CLASSES)
  variables = model.init(key, images, False)
  params, stats = variables['params'], variables.get('batch_stats', {})
  tx = optax.sgd(0.01, momentum=0.9)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def step(params, stats, opt_state, key):
    def loss(params):
      logits, mutated = model.apply(
        {'params': params, 'batch_stats': stats},
        images,
        True,
        mutable=['batch_stats'],
        rngs={'dropout': key},
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), mutated.get('batch_stats', {})

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = tx.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), new, opt_state, value

  carry = (params, stats, tx.init(params))

  def work(times: int) -> None:
    nonlocal carry
    for number in range(times):
      *carry, value = step(*carry, jax.random.fold_in(key, number))
    jax.block_until_ready((carry, value, jnp.zeros(())))

  return work


def torch(network: str, batch: int):
  """PyTorch, channels last."""
  import os

  import torch
  from torch import nn

  torch.set_num_threads(os.cpu_count() or 1)
  normed = network == 'batchnorm'
  widths = (96, 256, 384, 384, 256) if normed else (64, 192, 384, 256, 256)

  def stage(inputs: int, features: int, size: int, strides: int = 1) -> list[nn.Module]:
    if strides == 4 and normed:  # SAME, as XLA and TensorFlow pad it
      conv = [nn.ZeroPad2d((3, 4, 3, 4)), nn.Conv2d(inputs, features, size, strides)]
    else:
      conv = [nn.Conv2d(inputs, features, size, strides, 2 if size == 11 else size // 2)]
    norm = [nn.BatchNorm2d(features, 1e-3, 0.01)] if normed else []
    return [*conv, nn.ReLU(), *norm]

  def pool() -> nn.Module:
    return nn.MaxPool2d(3, 2)

  def dense(inputs: int) -> list[nn.Module]:
    layers = [nn.Linear(inputs, 4096), nn.ReLU()]
    return [*layers, nn.Dropout(0.5)] if normed else [nn.Dropout(0.5), *layers]

  model = nn.Sequential(
    *(*stage(3, widths[0], 11, 4), pool(), *stage(widths[0], widths[1], 5), pool()),
    *(*stage(widths[1], widths[2], 3), *stage(widths[2], widths[3], 3)),
    *(*stage(widths[3], widths[4], 3), pool(), nn.Flatten()),
    *(*dense(9216), *dense(4096), nn.Linear(4096, CLASSES)),
  ).to(memory_format=torch.channels_last)
  images = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
  labels = torch.randint(0, CLASSES, (batch,))
  optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

  def work(times: int) -> None:
    for _ in range(times):
      optimizer.zero_grad()
      nn.functional.cross_entropy(model(images), labels).backward()
      optimizer.step()

  return work


def keras(network: str, batch: int):
  """Keras on TensorFlow: `train_on_batch`'s compiled step."""
  import os

  os.environ['KERAS_BACKEND'] = 'tensorflow'
  import keras
  import numpy as np
  from keras import layers

  normed = network == 'batchnorm'
  widths = (96, 256, 384, 384, 256) if normed else (64, 192, 384, 256, 256)
  model = keras.Sequential([layers.Input((SIZE, SIZE, 3))])
  sizes = ((11, 4, True), (5, 1, True), (3, 1, False), (3, 1, False), (3, 1, True))
  for features, (size, strides, pooled) in zip(widths, sizes, strict=True):
    if strides == 4 and not normed:
      model.add(layers.ZeroPadding2D(2))
    padding = 'valid' if strides == 4 and not normed else 'same'
    model.add(layers.Conv2D(features, size, strides, padding, activation='relu'))
    if normed:
      model.add(layers.BatchNormalization())
    if pooled:
      model.add(layers.MaxPooling2D(3, 2))
  model.add(layers.Flatten())
  for _ in range(2):
    dense, drop = layers.Dense(4096, activation='relu'), layers.Dropout(0.5)
    for layer in (dense, drop) if normed else (drop, dense):
      model.add(layer)
  model.add(layers.Dense(CLASSES))
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
  labels = rng.integers(0, CLASSES, batch)

  def work(times: int) -> None:
    for _ in range(times):
      model.train_on_batch(images, labels)

  return work


PEERS = {'ours': ours, 'plain_linen': plain_linen, 'torch': torch, 'keras': keras}


def main() -> None:
  import peers

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--network', choices=('batchnorm', 'torchvision'), default='batchnorm')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--steps', type=int, default=4, help='a round')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--only', nargs='+', choices=tuple(PEERS), default=list(PEERS))
  parser.add_argument('--torch-python', default=sys.executable, help='the Python that has PyTorch')
  arguments = parser.parse_args()
  workers = [
    peers.Worker(
      'train_step.py',
      name,
      arguments.torch_python if name == 'torch' else sys.executable,
      network=arguments.network,
      batch=arguments.batch,
    )
    for name in arguments.only
  ]
  seconds = peers.compare(workers, arguments.steps, arguments.rounds)
  images = arguments.steps * arguments.batch
  rates = {name: None if s is None else round(images / s, 2) for name, s in seconds.items()}
  print(json.dumps(rates | {'network': arguments.network, 'batch': arguments.batch}))


if __name__ == '__main__':
  main()
