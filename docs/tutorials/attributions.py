"""Which pixels speak for a class: a network learns a square's colour, and attributions find the square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax import (
  Activation,
  AlexNet,
  Conv,
  Dense,
  Flatten,
  Pool,
  Preprocessing,
  Spec,
  create_train_state,
  sgd,
  train_step,
)
from alexnet_flax.inference.attributions import METHODS

layers = (
  *(Conv(8, 5), Activation(), Pool()),
  *(Conv(16, 3), Activation(), Pool()),
  *(Flatten(), Dense(None)),
)
neutral = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
spec = Spec('squares', layers, image_size=24, source='a tutorial', num_classes=2, preprocessing=neutral)
rng = np.random.default_rng(0)


def squares(number):
  """Noise with a square of 6 x 6 pixels, red (class 0) or blue (class 1)."""
  images = rng.integers(0, 160, (number, 24, 24, 3), np.uint8)
  labels, places = rng.integers(0, 2, number), rng.integers(0, 19, (number, 2))
  inside = np.zeros((number, 24, 24), bool)
  for image, label, (top, left), mask in zip(images, labels, places, inside, strict=True):
    image[top : top + 6, left : left + 6] = (230, 30, 30) if label == 0 else (30, 30, 230)
    mask[top : top + 6, left : left + 6] = True
  return images, labels, inside


images, labels, _ = squares(512)
model = AlexNet(spec)
initialize = functools.partial(create_train_state, model, sgd(0.05, momentum=0.9), image_shape=(24, 24, 3))
state = jax.jit(initialize)(jax.random.key(0))
step = jax.jit(train_step)
for start in [*range(0, 512, 32)] * 4:
  some = slice(start, start + 32)
  batch = {
    'image': jnp.float32(images[some]) / 127.5 - 1,
    'label': jnp.int32(labels[some]),
    'weight': jnp.ones(32),
  }
  state, metrics = step(state, batch, jax.random.key(1))

# Every method takes uint8 images, and explains the most probable class unless it is given one.
images, labels, inside = squares(8)
variables = {'params': state.params}
for name, method in METHODS.items():
  found = method(model, variables, images, labels)
  maps = np.abs(found).sum(-1) if found.ndim == 4 else np.maximum(found, 0)
  maps = np.stack([jax.image.resize(one, (24, 24), 'linear') for one in maps])
  share = (maps * inside).sum((1, 2)) / maps.sum((1, 2))
  print(f'{name}: {share.mean():.0%} of the attribution lies in the square, 6 % of the image')
