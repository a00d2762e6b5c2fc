"""Temperature scaling: a network that knows few images by heart is too confident, until it is calibrated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax
from sklearn.datasets import load_digits

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
from alexnet_flax.evaluation.calibration import fit_temperature, scaled
from alexnet_flax.evaluation.scores import Predictions

digits, labels = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
noise = np.random.default_rng(0).normal(0, 0.5, (1797, 8, 8, 3))
images = (digits.reshape(-1, 8, 8, 1) / 8 - 1 + noise).astype(np.float32)
order = np.random.default_rng(0).permutation(1797)
train, fitting, test = np.split(order, [97, 947])

layers = (Conv(32, 3), Activation(), Pool(2, 2), Flatten(), Dense(64), Activation(), Dense(None))
neutral = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
spec = Spec('digits', layers, image_size=8, source='a tutorial', num_classes=10, preprocessing=neutral)
model = AlexNet(spec)
tx = sgd(0.05, momentum=0.9)
state = jax.jit(functools.partial(create_train_state, model, tx, image_shape=(8, 8, 3)))(jax.random.key(0))
batch = {'image': images[train], 'label': jnp.int32(labels[train]), 'weight': jnp.ones(len(train))}
step = jax.jit(train_step)
for _ in range(100):
  state, metrics = step(state, batch, jax.random.key(1))
print(f'{len(train)} images, learned by heart: loss {metrics["loss"]:.3f}')
logits_of = jax.jit(lambda some: model.apply({'params': state.params}, some, train=False))


def predict(chosen):
  """Returns what `evaluate` gathers, about images by their numbers."""
  values = log_softmax(np.asarray(logits_of(images[chosen])), axis=1)
  top, truth = np.argsort(-values, axis=1)[:, :5], labels[chosen]
  return Predictions(
    top_classes=top,
    probabilities=np.exp(np.take_along_axis(values, top, 1)),
    losses=-values[np.arange(len(chosen)), truth],
    correct_classes=[(label,) for label in truth.tolist()],
    indices=chosen,
    log_probabilities=values,
  )


before, other = predict(test), predict(fitting)
temperature = fit_temperature(other.log_probabilities, other.labels)
after = scaled(before, np.full(len(test), temperature))
print(f'temperature {temperature:.2f}, fitted on {len(fitting)} other images')
for name, one in (('before', before), ('after', after)):
  confidence, top1 = one.probabilities[:, 0].mean(), one.top_k(1).value
  print(f'{name}: top1 {top1:.1%} with confidence {confidence:.1%},', end=' ')
  print(f'calibration error {one.calibration_error():.3f}, loss {one.mean_loss().value:.3f}')
