"""Shape or texture: what networks decide by depends on what they have seen, and two need not err alike."""

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
from alexnet_flax.evaluation.shape_bias import error_consistency, shape_bias

STEPS = 60

# Four toy objects with names of the toolbox's categories: each has a shape, a mask, and a texture.
NAMES = ['clock', 'oven', 'knife', 'bottle']
y, x = np.mgrid[-8:8, -8:8] + 0.5
SHAPES = [x**2 + y**2 < 64, (abs(x) < 7) & (abs(y) < 7), abs(x) < (8 + y) / 2, (abs(x) < 3) | (abs(y) < 3)]
rows, columns = np.mgrid[:16, :16] // 2 % 2
diagonal = np.add(*np.mgrid[:16, :16]) // 2 % 2
TEXTURES = [1.8 * texture - 0.9 for texture in (rows, columns, diagonal, rows ^ columns)]

rng = np.random.default_rng(0)


def draw(shapes, textures):
  """Returns images [N, 24, 24, 3] in -1 ... 1: an object each, anywhere on noise."""
  images = rng.uniform(-0.3, 0.3, (len(shapes), 24, 24, 3)).astype(np.float32)
  places = rng.integers(0, 9, (len(shapes), 2))
  for image, shape, texture, (top, left) in zip(images, shapes, textures, places, strict=True):
    inside = image[top : top + 16, left : left + 16]
    inside[SHAPES[shape]] = TEXTURES[texture][SHAPES[shape], None]
  return images


layers = (
  *(Conv(8, 5), Activation(), Pool()),
  *(Conv(16, 3), Activation(), Pool()),
  *(Flatten(), Dense(None)),
)
neutral = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
spec = Spec('objects', layers, image_size=24, source='a tutorial', num_classes=4, preprocessing=neutral)
model = AlexNet(spec)
initialize = jax.jit(
  functools.partial(create_train_state, model, sgd(0.03, momentum=0.9), image_shape=(24, 24, 3))
)
step = jax.jit(train_step)
logits = jax.jit(lambda params, images: model.apply({'params': params}, images, train=False))


def train(seed, share):
  """Trains a network to name shapes, with their own textures but for a share of the images."""
  state, weight = initialize(jax.random.key(seed)), jnp.ones(32)
  for _ in range(STEPS):
    labels = rng.integers(0, 4, 32)
    images = draw(labels, np.where(rng.random(32) < share, rng.integers(0, 4, 32), labels))
    batch = {'image': images, 'label': jnp.int32(labels), 'weight': weight}
    state, _ = step(state, batch, jax.random.key(1))
  return state.params


networks = {
  'own textures': train(0, share=0),
  'a fifth with any texture': train(0, share=0.2),
  'the same, another seed': train(1, share=0.2),
  'any texture': train(0, share=1),
}

# Every shape with every texture, 16 times, by names such as clock1-oven1.png.
pairs = [(shape, texture) for shape in range(4) for texture in range(4)] * 16
names = [
  f'{NAMES[shape]}{number}-{NAMES[texture]}{number}.png' for number, (shape, texture) in enumerate(pairs)
]
images = draw(*zip(*pairs, strict=True))
decisions = {}
for name, params in networks.items():
  best = np.argmax(logits(params, images), axis=-1)
  decisions[name] = dict(zip(names, (NAMES[one] for one in best), strict=True))
for name, own in decisions.items():
  bias = shape_bias(own)
  print(f'{name}: shape bias {bias["shape_bias"]:.0%} ({bias["low"]:.0%} ... {bias["high"]:.0%}),', end=' ')
  kappa = error_consistency(decisions['a fifth with any texture'], own)
  print(f'error consistency with the second network {kappa:.2f}')
