"""Trains a narrow AlexNet with batch normalization on digits, without TFDS, files or commands."""

import functools

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from alexnet_flax import VARIANTS, AlexNet, BatchNorm, create_train_state, eval_step, sgd, train_step

STEPS, BATCH = 45, 32

digits, labels = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
small = (digits.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
large = np.stack([np.asarray(Image.fromarray(one).resize((57, 57))) for one in small])
images = np.repeat(large[..., None], 3, axis=-1).astype(np.float32) / 127.5 - 1
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1500], order[1500:]


def batch(indices):
  """Returns the examples of one step."""
  weight = np.ones(len(indices), np.float32)
  return {'image': images[indices], 'label': labels[indices].astype(np.int32), 'weight': weight}


# After so few steps, running statistics with the variant's momentum of 0.99 would still be near their start.
spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=57).replace(BatchNorm, momentum=0.8)
model = AlexNet(spec, num_classes=10)
tx = sgd(0.02, momentum=0.9)
state = jax.jit(functools.partial(create_train_state, model, tx, image_shape=(57, 57, 3)))(jax.random.key(0))
step = jax.jit(train_step, donate_argnums=0)
for number in range(STEPS):
  chosen = np.random.default_rng(number).choice(train, BATCH, replace=False)
  state, metrics = step(state, batch(chosen), jax.random.key(1))
  if number % 15 == 14:
    print(f'step {number + 1}: loss {metrics["loss"]:.3f}, top1 {metrics["top1"]:.1%}')

metrics = jax.jit(eval_step)(state, batch(test))
print(f'{len(test)} held-out images: loss {metrics["loss"]:.3f}, top1 {metrics["top1"]:.1%}')
