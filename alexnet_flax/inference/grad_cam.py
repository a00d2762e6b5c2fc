"""Grad-CAM (Selvaraju et al. 2017), and its map overlaid on the image."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import caption_font
from alexnet_flax.errors import unknown_name
from alexnet_flax.inference.features import Images, inputs_of
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Conv, Flatten, Pool, Spec

if TYPE_CHECKING:
  from PIL import Image

_COLORS = 'inferno'
_OPACITY = 0.75  # where the map is 1; where it is 0 the image alone is seen
_SIDE = 448  # at least, of a drawing's two parts


def grad_cam(
  model: AlexNet,
  variables: Any,
  images: Images,
  classes: np.ndarray | None = None,
  *,
  layer: str | None = None,
  preprocessed: bool = False,
) -> np.ndarray:
  """Computes Grad-CAM maps: how strongly each position of a layer supports a class.

  A map is the ReLU of the sum of the layer's channels, each weighted by the mean gradient of the class's
  logit with respect to it (Selvaraju et al. 2017, equations 1 and 2).

  Args:
    model: The network.
    variables: Its variables.
    images: As for `features`: uint8 RGB of any sizes, or floats with `preprocessed`. A map is of what the
      network sees: the crop of an image.
    classes: int [N]; the top-1 prediction of each image if None.
    layer: A layer with spatial dimensions; `default_layer` if None.
    preprocessed: Whether the images are what the network receives.

  Returns:
    float32 [N, H, W] in 0 ... 1, with maximum 1; all 0 if no position supports the class.

  Raises:
    UsageError: There is no such layer.
    ValueError: The layer has no spatial dimensions, or images or classes have another shape.
  """
  names = [name for name, _ in model.spec.named_layers()]
  name = default_layer(model.spec) if layer is None else layer
  if name not in names:
    raise unknown_name('layer', name, names)
  views = np.stack(list(inputs_of(images, model.spec, preprocessed=preprocessed)))
  wanted = np.full(len(views), -1) if classes is None else np.asarray(classes)
  if wanted.shape != (len(views),):
    raise ValueError(f'classes (of shape {wanted.shape}) must have one class for each of {len(views)} images')
  return np.asarray(_compiled(model, name)(variables, views, wanted.astype(np.int32)))


def default_layer(spec: Spec) -> str:
  """Returns the last layer before the last pooling or the flattening, such as 'relu5' or 'norm5'."""
  layers = spec.named_layers()
  last = max(i for i, (_, layer) in enumerate(layers) if isinstance(layer, Conv))
  ends = (i for i, (_, layer) in enumerate(layers) if isinstance(layer, Pool | Flatten) and i > last)
  return layers[next(ends, last + 1) - 1][0]


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """Overlays a map, float [H, W] in 0 ... 1, on an image, uint8 [S, S, 3]: nothing at 0, yellow at 1."""
  import matplotlib
  from PIL import Image

  height, width = image.shape[:2]
  smooth = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
  heat = np.clip(np.asarray(smooth), 0, 1)
  colors, opacity = matplotlib.colormaps[_COLORS](heat)[..., :3] * 255, _OPACITY * heat[..., None]
  return np.round((1 - opacity) * image + opacity * colors).astype(np.uint8)


def drawing(view: np.ndarray, heat: np.ndarray, caption: str) -> 'Image.Image':
  """Draws what the network saw, uint8 [S, S, 3], beside its map, above a caption."""
  from PIL import Image, ImageDraw

  side = view.shape[0] * -(-_SIDE // view.shape[0])
  large = Image.fromarray(view).resize((side, side), Image.Resampling.BICUBIC)
  sheet = Image.new('RGB', (2 * side + 12, side + 40), 'white')
  sheet.paste(large, (0, 0))
  sheet.paste(Image.fromarray(overlay(np.asarray(large), heat)), (side + 12, 0))
  ImageDraw.Draw(sheet).text((8, side + 8), caption, 'black', caption_font(20))
  return sheet


@functools.lru_cache(maxsize=4)
def _compiled(model: AlexNet, layer: str) -> Any:
  def cam(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    inputs = images
    if images.dtype == jnp.uint8:
      inputs = normalize({'image': images}, preprocessing=model.spec.preprocessing)['image']

    def wanted(perturbation: jax.Array) -> Any:
      logits, taps = model.apply(
        variables, inputs, train=False, endpoints=True, perturbations={layer: perturbation}
      )
      chosen = jnp.where(classes < 0, jnp.argmax(logits, -1).astype(jnp.int32), classes)
      return jnp.take_along_axis(logits, chosen[:, None], axis=1).sum(), taps[layer]

    shape = jax.eval_shape(lambda: model.apply(variables, inputs, train=False, endpoints=True)[1][layer])
    if len(shape.shape) != 4:
      raise ValueError(f'the layer {layer} has no spatial dimensions; choose one before the flattening')
    gradient, activations = jax.grad(wanted, has_aux=True)(jnp.zeros(shape.shape, jnp.float32))
    weights = gradient.mean((1, 2), keepdims=True)
    heat = jax.nn.relu((weights * activations.astype(jnp.float32)).sum(-1))
    largest = heat.max((1, 2), keepdims=True)
    return heat / jnp.where(largest > 0, largest, 1.0)

  return jax.jit(cam)
