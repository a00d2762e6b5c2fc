"""What a unit likes: an image made to activate it, and the images of a data set that activate it most."""

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from alexnet_flax.data.augment import normalize, standardize
from alexnet_flax.data.prepare.color_pca import IMAGENET
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Activation
from alexnet_flax.pretrained import PretrainedModel

Objective = Literal['channel', 'center']
AT_ONCE = 16  # units that one program maximises
# As in lucid (github.com/tensorflow/lucid, optvis): the deviation of first coefficients, the divisor of their
# sum (param/spatial.py), Adam's rate, crops without 8 of 128 pixels (render.py), and scales (transform.py).
_DEVIATION, _DIVISOR, _ADAM, _JITTER, _SCALES = 0.01, 4.0, optax.adam(0.05), 4 / 128, (0.9, 1.1)
# Colours vary along ImageNet's components by the roots of their eigenvalues: the matrix of param/color.py.
_DEVIATIONS = np.sqrt(np.divide(IMAGENET.eigenvalues, max(IMAGENET.eigenvalues)))
_COLORS = (_DEVIATIONS[:, None] * np.array(IMAGENET.eigenvectors)).astype(np.float32)  # [component, RGB]


class TopImage(NamedTuple):
  """An image that a unit likes."""

  name: str
  view: np.ndarray  # uint8 [S, S, 3], as the network sees it
  activation: float  # the greatest of all places
  row: int  # of that place, in units of the layer; 0 in layers without space
  column: int


def parse_units(text: str, count: int) -> list[int]:
  """Parses a list of units, of which a layer has `count`; raises UsageError if it has another form.

  >>> parse_units('0-2,7', 64)
  [0, 1, 2, 7]
  """
  found: list[int] = []
  for part in text.split(','):
    fits = re.fullmatch(r' *[0-9]{1,9}( *- *[0-9]{1,9})? *', part)
    first, last = (int(part.split('-')[end]) for end in (0, -1)) if fits else (1, 0)
    if first > last:
      raise UsageError(f'--units {text}: {part!r} is neither a unit nor a range; write them as in 0-15,20')
    if last >= count:
      raise UsageError(f'--units {text}: there is no unit {last}; the layer has 0 ... {count - 1}')
    found += range(first, last + 1)
  return list(dict.fromkeys(found))


def output_shape(network: PretrainedModel, layer: str) -> tuple[int, ...]:
  """Returns the shape of a layer's output, (H, W, C) or (C,); raises UsageError if there is no such layer."""
  spec = network.spec
  if layer not in (names := [name for name, _ in spec.named_layers()]):
    raise unknown_name('layer', layer, names)
  inputs = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  taps = functools.partial(network.model.apply, train=False, endpoints=True)
  return jax.eval_shape(taps, network.variables, inputs)[1][layer].shape[1:]


def maximize(
  network: PretrainedModel,
  layer: str,
  units: Sequence[int],
  objective: Objective = 'channel',
  steps: int = 96,
  seed: int = 0,
) -> np.ndarray:
  """Returns for each unit of a layer an image that activates it strongly: uint8 RGB [U, S, S, 3].

  As in Olah, Mordvintsev and Schubert (2017, 'Feature Visualization', Distill), an image is the sigmoid of a
  sum of waves, weighted by their lengths, in decorrelated colours; Adam maximises the activation by the image
  shifted and scaled at random. Meanwhile ReLUs pass 1 % of negative values: silent units have no gradient.

  Args:
    network: The network.
    layer: The layer; the units of the last one are the logits of the classes.
    units: Its channels. The image of one does not depend on the others, but for rounding.
    objective: In layers with space, the mean of the 'channel' or its unit in the 'center'.
    steps: The number of steps.
    seed: The seed of first images, shifts and scales.

  Raises:
    UsageError: There is no such layer.
  """
  output_shape(network, layer)
  size, parts = network.spec.image_size, [units[at : at + AT_ONCE] for at in range(0, len(units), AT_ONCE)]
  draw = functools.partial(jax.random.normal, shape=(size, size // 2 + 1, 3, 2))
  found = []
  with tqdm(total=steps * len(parts), unit='step', disable=not sys.stderr.isatty()) as bar:
    for part in parts:
      chosen = jnp.asarray(part, jnp.int32)
      keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(chosen)
      waves = _DEVIATION * jax.vmap(draw)(keys)
      moment = waves, _ADAM.init(waves)
      for number in range(steps):
        moment = _step(
          network.model, network.variables, layer, objective, moment, chosen, keys, np.int32(number)
        )
        jax.block_until_ready(moment)
        bar.update()
      found.append(np.round(255 * np.asarray(_pixels(moment[0]))).astype(np.uint8))
  return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), donate_argnums=4)
def _step(
  model: AlexNet, variables: Any, layer: str, objective: str, moment: Any, units: Any, keys: Any, number: Any
) -> Any:
  """Returns the next coefficients of the images' waves, and the state of Adam."""
  layers = [Activation('leaky_relu') if one == Activation('relu') else one for one in model.spec.layers]
  leaky = dataclasses.replace(model.spec, layers=tuple(layers))
  theirs = dict(
    zip(*([name for name, _ in spec.named_layers()] for spec in (model.spec, leaky)), strict=True)
  )
  keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

  def loss(waves: jax.Array) -> jax.Array:
    inputs = standardize(255.0 * jax.vmap(_moved)(_pixels(waves), keys), model.spec.preprocessing)
    taps = model.clone(spec=leaky).apply(variables, inputs, train=False, endpoints=True)[1]
    if (values := taps[theirs[layer]]).ndim == 4:
      height, width = values.shape[1:3]
      values = values.mean((1, 2)) if objective == 'channel' else values[:, height // 2, width // 2]
    return -jnp.take_along_axis(values, units[:, None], axis=1).sum()

  waves, state = moment
  updates, state = _ADAM.update(jax.grad(loss)(waves), state)
  return optax.apply_updates(waves, updates), state


@jax.jit
def _pixels(waves: jax.Array) -> jax.Array:
  """Turns coefficients, [U, S, S // 2 + 1, 3, 2] with real and imaginary parts, into RGB in 0 ... 1."""
  size = waves.shape[1]
  frequencies = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
  scale = (size / np.maximum(frequencies, 1 / size) / _DIVISOR).astype(np.float32)
  scaled = waves * scale[None, ..., None, None]
  images = jnp.fft.irfft2(jax.lax.complex(scaled[..., 0], scaled[..., 1]), (size, size), axes=(1, 2))
  return jax.nn.sigmoid(images @ _COLORS)


def _moved(image: jax.Array, key: jax.Array) -> jax.Array:
  """Shifts an image [S, S, 3] at random, and scales it about its centre; what comes in is grey."""
  size, (scale_key, shift_key) = image.shape[0], jax.random.split(key)
  scale = jax.random.uniform(scale_key, minval=_SCALES[0], maxval=_SCALES[1])
  shift = jax.random.uniform(shift_key, (2,), minval=-_JITTER * size, maxval=_JITTER * size)
  how = jnp.stack([scale, scale]), shift + (1 - scale) * size / 2, jax.image.ResizeMethod.LINEAR
  return 0.5 + jax.image.scale_and_translate(image - 0.5, image.shape, (0, 1), *how, antialias=False)


@functools.partial(jax.jit, static_argnums=(0, 2))
def peaks(model: AlexNet, variables: Any, layer: str, units: Any, views: Any) -> tuple[jax.Array, ...]:
  """Returns the greatest activation of units, int [U], by uint8 views [N, S, S, 3], and its row and column.

  Each is [N, U]. Of equal activations it is the first; places are 0 in layers without space.
  """
  inputs = normalize({'image': views}, preprocessing=model.spec.preprocessing)['image']
  values = model.apply(variables, inputs, train=False, endpoints=True)[1][layer].astype(jnp.float32)
  chosen = values.reshape(len(views), -1, values.shape[-1])[:, :, units]
  return chosen.max(1), *jnp.divmod(chosen.argmax(1), values.shape[2] if values.ndim == 4 else 1)


def top_images(
  network: PretrainedModel,
  layer: str,
  units: Sequence[int],
  images: Iterable[tuple[str, np.ndarray]],
  top: int = 8,
  batch_size: int = 64,
) -> list[list[TopImage]]:
  """Returns for each unit the `top` images that activate it most, most first; of equals the earlier first.

  `images` yields names and views, uint8 [S, S, 3]. Two batches and the best are all that is held.
  """
  best: list[list[TopImage]] = [[] for _ in units]
  stream = iter(images)
  while batch := list(itertools.islice(stream, batch_size)):
    views = np.stack([view for _, view in batch])
    filled = np.concatenate([views, np.repeat(views[:1], batch_size - len(batch), 0)])
    values, rows, columns = jax.device_get(
      peaks(network.model, network.variables, layer, np.asarray(units), filled)
    )
    for unit, kept in enumerate(best):
      for i in np.argsort(-values[: len(batch), unit], kind='stable')[:top].tolist():
        place = float(values[i, unit]), int(rows[i, unit]), int(columns[i, unit])
        kept.append(TopImage(batch[i][0], views[i].copy(), *place))
      kept[:] = sorted(kept, key=lambda one: -one.activation)[:top]
  return best
