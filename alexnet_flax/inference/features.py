"""Activations of named layers as features of images."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import evaluation_view
from alexnet_flax.errors import unknown_name
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec

Images = Sequence[np.ndarray] | np.ndarray | jax.Array
POOLS: dict[str, Callable[..., jax.Array]] = {'mean': jnp.mean, 'max': jnp.max}


def features(
  model: AlexNet,
  variables: Any,
  images: Images,
  layers: Sequence[str],
  *,
  preprocessed: bool = False,
  pool: str | None = None,
  dtype: Any = np.float32,
  batch_size: int = 64,
) -> dict[str, np.ndarray]:
  """Returns the activations of the named layers, in evaluation mode.

  Args:
    model: The network.
    variables: Its variables.
    images: uint8 RGB images of any size: a sequence of [H, W, 3], or an array [N, H, W, 3]. Each is resized,
      cropped and normalised as in evaluation; one of exactly the network's size is only normalised. With
      `preprocessed`, float [N, H, W, 3], which the network receives unchanged.
    layers: The names of endpoints, such as ['relu3', 'fc7'].
    preprocessed: See `images`.
    pool: 'mean' or 'max' over the spatial dimensions of layers that have them; None for no pooling.
    dtype: The type of the result.
    batch_size: Images per batch; the last batch is padded.

  Returns:
    By layer, [N, H, W, C], or [N, C] if the layer has no spatial dimensions or is pooled. Row i is image i.

  Raises:
    UsageError: There is no such layer or pooling.
    ValueError: An image does not have the shape and type stated above.

  >>> import jax, numpy as np
  >>> from alexnet_flax import AlexNet, VARIANTS, features
  >>> model = AlexNet(VARIANTS['torchvision'].scaled(1 / 16, image_size=67))
  >>> variables = model.init(jax.random.key(0), np.zeros([1, 67, 67, 3], 'float32'), train=False)
  >>> image = np.zeros([300, 400, 3], np.uint8)
  >>> {name: x.shape for name, x in features(model, variables, [image], ['relu3', 'fc7']).items()}
  {'relu3': (1, 3, 3, 24), 'fc7': (1, 256)}
  """
  views = inputs_of(images, model.spec, preprocessed=preprocessed)
  parts = list(feature_batches(model, variables, views, layers, pool=pool, batch_size=batch_size))
  return {name: np.concatenate([part[name] for part in parts]).astype(dtype) for name in layers}


def inputs_of(images: Images, spec: Spec, *, preprocessed: bool) -> Iterator[np.ndarray]:
  """Yields the views of images as for `features`: uint8 [S, S, 3], or float [H, W, 3] unchanged.

  Raises:
    ValueError: There are no images, or one has another shape or type.
  """
  if not len(images):
    raise ValueError('there are no images')
  for image in map(np.asarray, images):
    if not preprocessed:
      own = image.shape == (spec.image_size, spec.image_size, 3) and image.dtype == np.uint8
      yield image if own else evaluation_view(image, spec)
    elif image.ndim == 3 and jnp.issubdtype(image.dtype, jnp.floating):
      yield image
    else:
      raise ValueError(f'preprocessed images must be floats [N, H, W, 3]; one is {image.dtype} {image.shape}')


def feature_batches(
  model: AlexNet,
  variables: Any,
  views: Iterable[np.ndarray],
  layers: Sequence[str],
  *,
  pool: str | None = None,
  batch_size: int = 64,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields features batch by batch, for an iterable of views.

  Args:
    model, variables, layers, pool, batch_size: See `features`.
    views: uint8 [S, S, 3], cropped as in evaluation, or float [S, S, 3], also normalised.
  """
  known = [name for name, _ in model.spec.named_layers()]
  for name in layers:
    if name not in known:
      raise unknown_name('layer', name, known)
  if pool is not None and pool not in POOLS:
    raise unknown_name('pooling', pool, POOLS)
  taps = _compiled(model, tuple(layers), pool)
  stream = iter(views)
  while batch := list(itertools.islice(stream, batch_size)):
    whole = np.stack([np.asarray(view) for view in batch])
    filled = np.concatenate([whole, np.repeat(whole[:1], batch_size - len(batch), 0)])
    results = jax.device_get(taps(variables, filled))
    yield {name: result[: len(batch)] for name, result in results.items()}


@functools.lru_cache(maxsize=16)
def _compiled(model: AlexNet, layers: tuple[str, ...], pool: str | None) -> Any:
  def taps(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    if images.dtype == jnp.uint8:
      images = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']
    _, found = model.apply(variables, images, train=False, endpoints=True)
    chosen = {name: found[name].astype(jnp.float32) for name in layers}
    return {name: POOLS[pool](x, (1, 2)) if pool and x.ndim == 4 else x for name, x in chosen.items()}

  return jax.jit(taps)
