"""The whole training step, or the forward pass alone: ours, plain linen code, PyTorch and Keras.

  python benchmarks/train_step.py [--batch 32] [--network batchnorm] [--forward] [--torch-python PATH]
  python benchmarks/train_step.py --only ours deterministic     the price of deterministic=true, on CPU or GPU

All programs run the same network and batch in turn: float32, forward, backward and SGD with momentum, on
images in memory. PyTorch may be in another environment. The last line is one JSON object: images/s (medians
of the rounds), milliseconds of CPU time a step on all cores together, which other programs disturb less, and
the most memory of each process in MB. A peer that is not installed is null. `price` is the time of a step
with deterministic=true, as a multiple of that without it: medians of the rounds' ratios, of wall and CPU.
"""

import argparse
import functools
import json
import os
import statistics
import sys

CLASSES = 1000
SIZE = 224
WIDTHS = {
  'batchnorm': (96, 256, 384, 384, 256),
  'paper': (96, 256, 384, 384, 256),
  'torchvision': (64, 192, 384, 256, 256),
}
SIZES = (11, 5, 3, 3, 3)
GROUPS = {'paper': (1, 2, 1, 2, 2)}


def stages(network: str):
  """(features, kernel side, strides, groups, pooled) of each convolution."""
  groups = GROUPS.get(network, (1,) * 5)
  strides, pooled = (4, 1, 1, 1, 1), (True, True, False, False, True)
  return zip(WIDTHS[network], SIZES, strides, groups, pooled, strict=True)


def ours(network: str, batch: int, forward: bool, options: dict | None = None):
  """This package's training step, as `train.py` makes it."""
  import jax
  import jax.numpy as jnp

  from alexnet_flax import VARIANTS, AlexNet, create_train_state, keep_cpu_memory, sgd, train_step

  keep_cpu_memory()
  model = AlexNet(VARIANTS[network])
  tx = sgd(0.01, spec=model.spec)
  state = create_train_state(model, tx, jax.random.key(0), (SIZE, SIZE, 3))
  key = jax.random.key(1)
  data = {
    'image': jax.random.normal(key, (batch, SIZE, SIZE, 3)),
    'label': jax.random.randint(key, (batch,), 0, CLASSES),
    'weight': jnp.ones(batch),
  }
  step = jax.jit(train_step, donate_argnums=0, compiler_options=options)
  predict = jax.jit(functools.partial(model.apply, train=False), compiler_options=options)

  def work(times: int) -> None:
    nonlocal state
    for _ in range(times):
      if forward:
        out = predict({'params': state.params, 'batch_stats': state.batch_stats}, data['image'])
      else:
        state, out = step(state, data, key)
    jax.block_until_ready((state, out))

  return work


def deterministic(network: str, batch: int, forward: bool):
  """This package's training step, with what deterministic=true sets."""
  os.environ['NPROC'] = '1'
  import jax

  on_gpu = jax.default_backend() == 'gpu'
  return ours(network, batch, forward, {'xla_gpu_deterministic_ops': True} if on_gpu else None)


def plain_linen(network: str, batch: int, forward: bool):
  """The usual code: linen's own layers, optax.sgd and a jitted step."""
  import jax
  import jax.numpy as jnp
  import optax
  from flax import linen as nn

  normed, local = network == 'batchnorm', network == 'paper'

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
      for number, (features, size, strides, groups, pooled) in enumerate(stages(network)):
        padding = [(2, 2), (2, 2)] if strides == 4 and not normed else 'SAME'
        x = nn.Conv(features, (size, size), strides, padding, feature_group_count=groups)(x)
        x = nn.relu(x)
        if normed:
          x = nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3)(x)
        if local and number < 2:
          padded = jnp.pad(x * x, ((0, 0), (0, 0), (0, 0), (2, 2)))
          x = x / (2 + 1e-4 * sum(padded[..., k : k + features] for k in range(5))) ** 0.75
        if pooled:
          x = pool(x)
      x = x.reshape(x.shape[0], -1)
      for _ in range(2):
        if network == 'torchvision':
          x = nn.relu(nn.Dense(4096)(nn.Dropout(0.5, deterministic=not train)(x)))
        else:
          x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4096)(x)))
      return nn.Dense(CLASSES)(x)

  model = Plain()
  key = jax.random.key(0)
  images = jax.random.normal(key, (batch, SIZE, SIZE, 3))
  labels = jax.random.randint(key, (batch,), 0, CLASSES)
  variables = model.init(key, images, False)
  params, stats = variables['params'], variables.get('batch_stats', {})
  tx = optax.sgd(0.01, momentum=0.9)
  predict = jax.jit(
    lambda params, stats: model.apply({'params': params, 'batch_stats': stats}, images, False)
  )

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
      if forward:
        value = predict(*carry[:2])
      else:
        *carry, value = step(*carry, jax.random.fold_in(key, number))
    jax.block_until_ready((carry, value, jnp.zeros(())))

  return work


def torch(network: str, batch: int, forward: bool):
  """PyTorch, channels last."""
  import torch
  from torch import nn

  torch.set_num_threads(os.cpu_count() or 1)
  normed, local = network == 'batchnorm', network == 'paper'
  layers: list[nn.Module] = []
  inputs = 3
  for number, (features, size, strides, groups, pooled) in enumerate(stages(network)):
    padding = 2 if size == 11 else size // 2
    if strides == 4 and normed:  # SAME, as XLA and TensorFlow pad it
      layers.append(nn.ZeroPad2d((3, 4, 3, 4)))
      padding = 0
    layers += [nn.Conv2d(inputs, features, size, strides, padding, groups=groups), nn.ReLU()]
    if normed:
      layers.append(nn.BatchNorm2d(features, 1e-3, 0.01))
    if local and number < 2:
      layers.append(nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0))  # alpha is divided by the size
    if pooled:
      layers.append(nn.MaxPool2d(3, 2))
    inputs = features

  def dense(inputs: int) -> list[nn.Module]:
    both = [nn.Linear(inputs, 4096), nn.ReLU()]
    return [nn.Dropout(0.5), *both] if network == 'torchvision' else [*both, nn.Dropout(0.5)]

  layers += [nn.Flatten(), *dense(9216), *dense(4096), nn.Linear(4096, CLASSES)]
  model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
  images = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
  labels = torch.randint(0, CLASSES, (batch,))
  optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
  model.train(not forward)

  def work(times: int) -> None:
    for _ in range(times):
      if forward:
        with torch.inference_mode():
          model(images)
        continue
      optimizer.zero_grad()
      nn.functional.cross_entropy(model(images), labels).backward()
      optimizer.step()

  return work


def keras(network: str, batch: int, forward: bool):
  """Keras on TensorFlow: `train_on_batch`'s and `predict_on_batch`'s compiled steps."""
  os.environ['KERAS_BACKEND'] = 'tensorflow'
  import keras
  import numpy as np
  import tensorflow as tf
  from keras import layers

  normed, local = network == 'batchnorm', network == 'paper'

  def convolved(x, number, features, size, strides, groups):
    """TensorFlow has no derivative of a convolution in groups on CPUs, so each group has its own."""
    padding = 'valid' if strides == 4 and not normed else 'same'
    width = x.shape[-1] // groups
    parts = [
      layers.Conv2D(features // groups, size, strides, padding, activation='relu', name=f'conv{number}_{n}')(
        x
        if groups == 1
        else layers.Lambda(
          lambda x, n=n: x[..., n * width : (n + 1) * width], name=f'conv{number}_split_{n}'
        )(x)
      )
      for n in range(groups)
    ]
    return parts[0] if groups == 1 else layers.Concatenate(name=f'conv{number}_join')(parts)

  x = given = layers.Input((SIZE, SIZE, 3))
  for number, (features, size, strides, groups, pooled) in enumerate(stages(network), start=1):
    if strides == 4 and not normed:
      x = layers.ZeroPadding2D(2, name='conv1_pad')(x)
    x = convolved(x, number, features, size, strides, groups)
    if normed:
      x = layers.BatchNormalization(name=f'norm{number}')(x)
    if local and number <= 2:
      lrn = functools.partial(
        tf.nn.local_response_normalization, depth_radius=2, bias=2.0, alpha=1e-4, beta=0.75
      )
      x = layers.Lambda(lrn, name=f'norm{number}')(x)
    if pooled:
      x = layers.MaxPooling2D(3, 2, name=f'pool{number}')(x)
  x = layers.Flatten()(x)
  for number in (6, 7):
    dense = layers.Dense(4096, activation='relu', name=f'fc{number}')
    drop = layers.Dropout(0.5, name=f'drop{number}')
    x = dense(drop(x)) if network == 'torchvision' else drop(dense(x))
  model = keras.Model(given, layers.Dense(CLASSES, name='fc8')(x))
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
  labels = rng.integers(0, CLASSES, batch)

  def work(times: int) -> None:
    for _ in range(times):
      if forward:
        model.predict_on_batch(images)
      else:
        model.train_on_batch(images, labels)

  return work


PEERS = {
  'ours': ours,
  'deterministic': deterministic,
  'plain_linen': plain_linen,
  'torch': torch,
  'keras': keras,
}


def main() -> None:
  import peers

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--network', choices=tuple(WIDTHS), default='batchnorm')
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--forward', action='store_true', help='prediction alone')
  parser.add_argument('--steps', type=int, default=4, help='a round')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--only', nargs='+', choices=tuple(PEERS), default=list(PEERS))
  parser.add_argument('--torch-python', default=sys.executable, help='the Python that has PyTorch')
  arguments = parser.parse_args()
  case = {'network': arguments.network, 'batch': arguments.batch, 'forward': arguments.forward}
  workers = [
    peers.Worker('train_step.py', name, arguments.torch_python if name == 'torch' else sys.executable, **case)
    for name in arguments.only
  ]
  seconds = peers.compare(workers, arguments.steps, arguments.rounds)
  images = arguments.steps * arguments.batch
  found = {name: None if s is None else round(images / s, 2) for name, s in seconds.items()}
  present = [worker for worker in workers if worker.cpu_seconds]
  cpu = {w.name: round(statistics.median(w.cpu_seconds) / arguments.steps * 1000) for w in present}
  both = {w.name: w for w in workers if w.name in ('ours', 'deterministic')}
  price = {}
  if len(both) == 2:
    for kind in ('wall_seconds', 'cpu_seconds'):
      pairs = zip(getattr(both['deterministic'], kind), getattr(both['ours'], kind), strict=True)
      price[kind.removesuffix('_seconds')] = round(statistics.median(one / other for one, other in pairs), 3)
  memory = {w.name: w.peak_mb for w in present}
  print(json.dumps(found | case | {'cpu_ms': cpu, 'peak_mb': memory, 'price': price}))


if __name__ == '__main__':
  main()
