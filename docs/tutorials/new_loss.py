"""A custom loss: the focal loss (Lin et al. 2017), which down-weights easy examples."""

import functools

import jax
import jax.numpy as jnp

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step


def focal_loss(logits, labels, gamma=2.0):
  """Returns -(1 - p)^gamma log p of the correct class, [B]."""
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
  return -((1 - jnp.exp(log_p)) ** gamma) * log_p


model = AlexNet(VARIANTS['torchvision'].scaled(1 / 32, image_size=63), num_classes=10)
tx = sgd(0.01, momentum=0.9)
state = jax.jit(functools.partial(create_train_state, model, tx, image_shape=(63, 63, 3)))(jax.random.key(0))
step = jax.jit(functools.partial(train_step, loss=focal_loss))
batch = {
  'image': jax.random.normal(jax.random.key(1), (16, 63, 63, 3)),
  'label': jnp.arange(16) % 10,
  'weight': jnp.ones(16),
}
losses = []
for _ in range(5):
  state, metrics = step(state, batch, jax.random.key(2))
  losses.append(float(metrics['loss']))
print('focal loss:', ' '.join(f'{loss:.4f}' for loss in losses))
