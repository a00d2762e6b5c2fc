"""Takes over a trained network, freezes its convolutions, and trains a new head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step
from alexnet_flax.models.surgery import frozen_layers
from alexnet_flax.optim import freeze
from alexnet_flax.training.transfer import graft

spec = VARIANTS['batchnorm'].scaled(1 / 16, image_size=57)
images = jax.random.normal(jax.random.key(1), (16, 57, 57, 3))

# Stands for a trained network. With a real one: network = load_pretrained('runs/cifar10'), network.variables
pretrained = jax.jit(functools.partial(AlexNet(spec, num_classes=20).init, train=False))(
  jax.random.key(2), images
)

frozen = tuple(frozen_layers(spec, ['conv*', 'norm*']))
model = AlexNet(spec, num_classes=3, fixed_norms=tuple(name for name in frozen if name.startswith('norm')))
tx = freeze(sgd(0.01, momentum=0.9, spec=spec), frozen)
state = jax.jit(functools.partial(create_train_state, model, tx, image_shape=(57, 57, 3)))(jax.random.key(0))
fresh = {'params': state.params, 'batch_stats': state.batch_stats}
grafted = graft(fresh, spec, pretrained, spec, new_head=True)
print(f'loaded: {", ".join(grafted.loaded)}; new: {", ".join(grafted.new)}')

state = state.replace(params=grafted.variables['params'], batch_stats=grafted.variables['batch_stats'])
batch = {'image': images, 'label': jnp.arange(16) % 3, 'weight': jnp.ones(16)}
before = jax.device_get(state.params)
step = jax.jit(train_step)
for _ in range(3):
  state, metrics = step(state, batch, jax.random.key(3))

changed = [
  name
  for name, layer in before.items()
  if not all(np.array_equal(a, b) for a, b in zip(layer.values(), state.params[name].values(), strict=True))
]
print(f'loss {metrics["loss"]:.3f}; changed: {", ".join(changed)}')
