"""Where a network looks: Grad-CAM (Selvaraju et al. 2017), and the map laid over its image."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_flax.data.augment import normalize
from alexnet_flax.errors import unknown_name
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Conv, Pool, Spec

_COLORS = 'inferno'
_OPACITY = 0.55


def grad_cam(
  model: AlexNet,
  variables: Any,
  images: np.ndarray,
  classes: np.ndarray | None = None,
  *,
  layer: str | None = None,
) -> np.ndarray:
  """How much each place of a layer speaks for a class: the ReLU of the channels' sum, each weighted by the
  mean derivative of the class's logit by it (Selvaraju et al. 2017, equations 1 and 2).

  Args:
    model: the network.
    variables: its variables.
    images: uint8 RGB [N, S, S, 3], cut as in evaluation.
    classes: int [N]; the most probable one of each image if None.
    layer: with space; the last before the last pooling if None.

  Returns:
    float32 [N, H, W], the greatest value of each being 1; 0 where nothing speaks for the class.

  Raises:
    UsageError: there is no such layer.
    ValueError: the layer has no space.
  """
  names = [name for name, _ in model.spec.named_layers()]
  name = default_layer(model.spec) if layer is None else layer
  if name not in names:
    raise unknown_name('layer', name, names)
  wanted = np.full(len(images), -1) if classes is None else np.asarray(classes)
  return np.asarray(_compiled(model, name)(variables, images, wanted.astype(np.int32)))


def default_layer(spec: Spec) -> str:
  """The last layer with space before the last pooling; 'relu5' or 'norm5'."""
  layers = list(spec.named_layers())
  last = max(i for i, (_, layer) in enumerate(layers) if isinstance(layer, Conv))
  pools = [i for i, (_, layer) in enumerate(layers) if isinstance(layer, Pool) and i > last]
  return layers[pools[0] - 1 if pools else last][0]


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """An image under its map, in colours from black to yellow.

  Args:
    image: uint8 [S, S, 3].
    heat: float [H, W] in 0 ... 1, made as large as the image.

  Returns:
    uint8 [S, S, 3].
  """
  import matplotlib

  height, width = image.shape[:2]
  smooth = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
  heat = np.clip(np.asarray(smooth), 0, 1)
  colors = matplotlib.colormaps[_COLORS](heat)[..., :3] * 255
  return np.round((1 - _OPACITY) * image + _OPACITY * colors).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _compiled(model: AlexNet, layer: str) -> Any:
  def cam(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']

    def wanted(perturbation: jax.Array) -> Any:
      logits, taps = model.apply(
        variables, inputs, train=False, endpoints=True, perturbations={layer: perturbation}
      )
      chosen = jnp.where(classes < 0, jnp.argmax(logits, -1).astype(jnp.int32), classes)
      return jnp.take_along_axis(logits, chosen[:, None], axis=1).sum(), taps[layer]

    shape = jax.eval_shape(lambda: model.apply(variables, inputs, train=False, endpoints=True)[1][layer])
    if len(shape.shape) != 4:
      raise ValueError(f'the layer {layer} has no space left; choose one before the flattening')
    gradient, activations = jax.grad(wanted, has_aux=True)(jnp.zeros(shape.shape, jnp.float32))
    weights = gradient.mean((1, 2), keepdims=True)
    heat = jax.nn.relu((weights * activations.astype(jnp.float32)).sum(-1))
    greatest = heat.max((1, 2), keepdims=True)
    return heat / jnp.where(greatest > 0, greatest, 1.0)

  return jax.jit(cam)
