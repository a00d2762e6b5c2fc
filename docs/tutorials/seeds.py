"""Trains four seeds at once: the state is a pytree and the step is pure, so `vmap` runs them side by side."""

import jax
import jax.numpy as jnp

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step

SEEDS = 4
model = AlexNet(VARIANTS['torchvision'].scaled(1 / 32, image_size=63), num_classes=10)
tx = sgd(0.05, momentum=0.9)
keys = jax.random.split(jax.random.key(0), SEEDS)
states = jax.jit(jax.vmap(lambda key: create_train_state(model, tx, key, (63, 63, 3))))(keys)

batch = {
  'image': jax.random.normal(jax.random.key(1), (16, 63, 63, 3)),
  'label': jnp.arange(16) % 10,
  'weight': jnp.ones(16),
}
step = jax.jit(jax.vmap(train_step, in_axes=(0, None, 0)))  # one batch for all, a key for each
for _ in range(3):
  states, metrics = step(states, batch, keys)
losses = metrics.sums['loss'] / metrics.images
print(f'{SEEDS} seeds: loss {losses.mean():.4f} ± {losses.std():.4f}')
