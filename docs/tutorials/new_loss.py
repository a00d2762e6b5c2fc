"""A loss of one's own: the focal loss (Lin et al. 2017), which looks away from what is easy."""

import functools

import jax
import jax.numpy as jnp

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step


def focal_loss(logits, labels, gamma=2.0):
  """-(1 - p)^gamma log p of the right class, [B]."""
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
  return -((1 - jnp.exp(log_p)) ** gamma) * log_p


model = AlexNet(VARIANTS['torchvision'].scaled(1 / 16, image_size=67), num_classes=10)
state = create_train_state(model, sgd(0.01, momentum=0.9), jax.random.key(0), (67, 67, 3))
step = jax.jit(functools.partial(train_step, loss=focal_loss))
batch = {
  'image': jax.random.normal(jax.random.key(1), (16, 67, 67, 3)),
  'label': jnp.arange(16) % 10,
  'weight': jnp.ones(16),
}
losses = []
for _ in range(5):
  state, metrics = step(state, batch, jax.random.key(2))
  losses.append(float(metrics['loss']))
print('focal loss:', ' '.join(f'{loss:.4f}' for loss in losses))
