"""Trains the article's network, narrow, on scikit-learn's digits; without TFDS, files or command."""

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from alexnet_flax import VARIANTS, AlexNet, create_train_state, eval_step, sgd, train_step
from alexnet_flax.models.spec import BatchNorm

STEPS, BATCH = 60, 64

images, labels = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
small = (images.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
large = np.stack([np.asarray(Image.fromarray(one).resize((57, 57))) for one in small])
images = np.repeat(large[..., None], 3, axis=-1).astype(np.float32) / 127.5 - 1
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1500], order[1500:]


def batch(numbers):
  """What a step takes."""
  weight = np.ones(len(numbers), np.float32)
  return {'image': images[numbers], 'label': labels[numbers].astype(np.int32), 'weight': weight}


# So few steps would leave the running statistics near their start with the article's momentum, 0.99.
spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=57).replace(BatchNorm, momentum=0.8)
model = AlexNet(spec, num_classes=10)
state = create_train_state(model, sgd(0.02, momentum=0.9), jax.random.key(0), (57, 57, 3))
step = jax.jit(train_step, donate_argnums=0)
for number in range(STEPS):
  chosen = np.random.default_rng(number).choice(train, BATCH, replace=False)
  state, metrics = step(state, batch(chosen), jax.random.key(1))
  if number % 20 == 19:
    print(f'step {number + 1}: loss {metrics["loss"]:.3f}, top1 {metrics["top1"]:.1%}')

metrics = jax.jit(eval_step)(state, batch(test))
print(f'{len(test)} images it has not seen: loss {metrics["loss"]:.3f}, top1 {metrics["top1"]:.1%}')
