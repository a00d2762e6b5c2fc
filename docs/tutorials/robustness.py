"""Trains a narrow AlexNet on digits, misleads it, and measures how far the images look changed."""

import functools

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from alexnet_flax import VARIANTS, AlexNet, BatchNorm, create_train_state, lpips, sgd, train_step
from alexnet_flax.evaluation.adversarial import fgsm, logits_of, pgd

digits, labels = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
small = (digits.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
large = np.stack([np.asarray(Image.fromarray(one).resize((57, 57))) for one in small])
images, labels = np.repeat(large[..., None], 3, axis=-1) / np.float32(255), labels.astype(np.int32)

spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=57).replace(BatchNorm, momentum=0.8)
model, weight = AlexNet(spec, num_classes=10), np.ones(32, np.float32)
mean, std = (np.float32(x) for x in (spec.preprocessing.mean, spec.preprocessing.std))
tx = sgd(0.02, momentum=0.9)
state = jax.jit(functools.partial(create_train_state, model, tx, image_shape=(57, 57, 3)))(jax.random.key(0))
step = jax.jit(train_step, donate_argnums=0)
for number in range(45):
  chosen = np.random.default_rng(number).choice(1500, 32, replace=False)
  batch = {'image': (images[chosen] - mean) / std, 'label': labels[chosen], 'weight': weight}
  state, _ = step(state, batch, jax.random.key(1))

# For the published LPIPS: network = load_pretrained('torchvision'), and load_heads() in the place of these.
judge = AlexNet(VARIANTS['torchvision'].scaled(1 / 16, image_size=63))
heads = [np.full(channels, 0.1, np.float32) for channels in (4, 12, 24, 16, 16)]
untrained = jax.jit(functools.partial(judge.init, train=False))(
  jax.random.key(0), np.zeros((1, 63, 63, 3), 'f')
)
distance = jax.jit(functools.partial(lpips, judge, untrained, heads))

test, truth, epsilon = images[1500:1564], labels[1500:1564], 24 / 255
predict = logits_of(model, {'params': state.params, 'batch_stats': state.batch_stats})
attacks = {
  'no attack': lambda x: x,
  'FGSM': lambda x: fgsm(predict, x, truth, epsilon),
  'PGD': lambda x: pgd(predict, x, truth, epsilon, steps=5, key=jax.random.key(0)),
}
answer = jax.jit(lambda x: predict(x).argmax(-1))
for name, attack in attacks.items():
  changed = jax.jit(attack)(test)
  accuracy = (answer(changed) == truth).mean()
  print(f'{name}: top1 {accuracy:.1%}, LPIPS to the original {distance(test, changed).mean():.4f}')
