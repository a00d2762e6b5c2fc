"""LPIPS (Zhang et al. 2018): how different two images look, by the activations of torchvision's AlexNet."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import standardize
from alexnet_flax.data.images import UnreadableError, image_files, read_image
from alexnet_flax.errors import UsageError
from alexnet_flax.files import expanded
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.layers import at_least_float32
from alexnet_flax.models.spec import Conv, Spec
from alexnet_flax.models.surgery import computation
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.pretrained import PretrainedModel
from alexnet_flax.weights import open_weights
from alexnet_flax.weights.download import downloaded

LAYERS = ('relu1', 'relu2', 'relu3', 'relu4', 'relu5')
# The authors' heads, version 0.1, and the digest of the same file in the package lpips 0.1.4.
_COMMIT = '082bb24f84c091ea94de2867d34c4544f68e0963'
_REPOSITORY = f'https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/{_COMMIT}'
_HEADS = 'lpips/weights/v0.1/alex.pth'
_DIGEST = 'df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0'
# The channels of the heads that the authors publish for other networks.
_OTHERS = {(64, 128, 256, 512, 512): 'VGG', (64, 128, 256, 384, 384, 512, 512): 'SqueezeNet'}


def lpips(
  model: AlexNet,
  variables: Any,
  heads: Sequence[Any],
  first: jax.Array,
  second: jax.Array,
  spatial: bool = False,
) -> jax.Array:
  """Computes LPIPS, version 0.1: a distance, 0 for equal images but for rounding, that can be differentiated.

  In each of the layers relu1 ... relu5 the channels of each position are divided by their norm; the squared
  differences are weighted by the layer's head and averaged over positions; the layers are added (Zhang et al.
  2018, equation 1). Where all channels of a position are 0, the derivative of their norm is taken as 0: the
  package lpips has NaN there.

  Args:
    model: torchvision's AlexNet. Images may have any size from 31x31 on, as its head is not used.
    variables: Its variables.
    heads: The weights of the channels of the five layers, [C] each; see `load_heads`.
    first, second: float RGB in 0 ... 1, [N, H, W, 3].
    spatial: Instead of their means, resize the layers to the images' sides, bilinearly: where images differ.

  Returns:
    float32 [N], or [N, H, W] if spatial.

  Raises:
    UsageError: The network is another one.
    ValueError: The images differ in shape, or are too small.
    TypeError: The images are integers.
  """
  if first.shape != second.shape:
    raise ValueError(f'the images must have one shape; these have {first.shape} and {second.shape}')
  if not all(jnp.issubdtype(images.dtype, jnp.floating) for images in (first, second)):
    raise TypeError(f'images (of dtypes {first.dtype}, {second.dtype}) must be floats in 0 ... 1')
  part = model.clone(spec=trunk(model.spec))
  inputs = standardize(jnp.concatenate([first, second]) * 255.0, model.spec.preprocessing)
  _, taps = part.apply(variables, inputs, train=False, endpoints=True)
  distances = []
  for layer, head in zip(LAYERS, heads, strict=True):
    x = at_least_float32(taps[layer])
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    one, other = jnp.split(x / (jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + 1e-10), 2)
    squared = jnp.square(one - other) @ jnp.asarray(head, x.dtype)
    distances.append(
      jax.image.resize(squared, first.shape[:3], 'bilinear') if spatial else squared.mean((1, 2))
    )
  return jnp.stack(distances).sum(0)


def trunk(spec: Spec) -> Spec:
  """Returns the network up to relu5; raises UsageError unless it is torchvision's, of any width."""
  known = VARIANTS['torchvision']
  count = [name for name, _ in known.named_layers()].index(LAYERS[-1]) + 1

  def description(one: Spec) -> tuple[Any, ...]:
    layers = map(computation, one.layers[:count])
    anyhow = [dataclasses.replace(x, features=0) if isinstance(x, Conv) else x for x in layers]
    return anyhow, dataclasses.replace(one.preprocessing, center_crop_share=1.0)

  if description(spec) != description(known):
    raise UsageError(f"LPIPS is by torchvision's AlexNet, not by {spec.name}; give weights of torchvision's")
  return dataclasses.replace(spec, layers=spec.layers[:count])


def load_heads(
  source: str | os.PathLike[str] | None = None, spec: Spec = VARIANTS['torchvision']
) -> tuple[np.ndarray, ...]:
  """Returns the heads for `lpips`, float32 [C] of each layer.

  Args:
    source: A `.pth` file as the authors publish them; None for their own of version 0.1, from the package
      lpips if it is installed, or else by download.
    spec: The network that they are for.

  Raises:
    UsageError: The file cannot be read or downloaded, or is of another network.
  """
  needed = [layer.features for layer in trunk(spec).layers if isinstance(layer, Conv)]
  if source is None:
    found = importlib.util.find_spec('lpips')  # does not import it
    source = pathlib.Path(found.origin).parents[1] / _HEADS if found and found.origin else None
    if source is None or not source.is_file():
      source = downloaded(f'{_REPOSITORY}/{_HEADS}', _DIGEST)
  file = open_weights(source)
  heads = [array.reshape(-1) for name, array in sorted(file.stored.items()) if name.startswith('lin')]
  channels = tuple(head.size for head in heads)
  if list(channels) != needed or len(heads) != len(file.stored):
    whose = _OTHERS.get(channels, 'another network')
    wanted = ', '.join(map(str, needed))
    advice = f"give the authors' {_HEADS}" if channels in _OTHERS else f'they must have {wanted} channels'
    raise UsageError(f'{file.path} does not hold heads for this AlexNet, but those of {whose}; {advice}')
  return tuple(np.asarray(head, np.float32) for head in heads)


def image_pairs(first: str, second: str) -> list[tuple[str, str]]:
  """Returns the pairs of two images, or of the images of the same names in two folders.

  Raises:
    UsageError: Only one is a folder, a folder has no images, or the names in them differ.
  """
  places = [str(expanded(place)) for place in (first, second)]
  folders = [os.path.isdir(place) for place in places]
  if absent := next((place for place in places if not os.path.exists(place)), None):
    raise UsageError(f'cannot read {absent}: No such file or directory')
  if not any(folders):
    return [(places[0], places[1])]
  if not all(folders):
    folder, other = (first, second) if folders[0] else (second, first)
    raise UsageError(f'{folder} is a folder and {other} is not; name two images or two folders')
  ours, theirs = ({os.path.relpath(file, place): file for file in image_files([place])} for place in places)
  for here, there, place, other in ((ours, theirs, first, second), (theirs, ours, second, first)):
    if alone := [name for name in here if name not in there]:
      shown = ', '.join(alone[:3]) + f' and {len(alone) - 3} more' * (len(alone) > 3)
      raise UsageError(f'{place} has {shown}, which {other} lacks; the names must be the same')
  return [(file, theirs[name]) for name, file in ours.items()]


def distances(
  network: PretrainedModel,
  heads: Sequence[np.ndarray],
  pairs: Sequence[tuple[str, str]],
  spatial: bool = False,
) -> Iterator[np.ndarray]:
  """Yields LPIPS of each pair of image files, in order: float32 [], or [H, W] if `spatial`.

  Raises:
    UsageError: An image cannot be read or is too small, or the two of a pair differ in size.
  """
  smallest = trunk(network.spec).smallest_image_size()
  for pair in pairs:
    first, second = (_read(file, smallest) for file in pair)
    if first.shape != second.shape:
      sizes = ' and '.join(f'{image.shape[2]}x{image.shape[1]}' for image in (first, second))
      raise UsageError(
        f'{" and ".join(pair)} have {sizes} pixels; LPIPS is of images of one size: resize one'
      )
    found = _compiled(network.model, network.variables, tuple(heads), first, second, spatial)
    yield np.asarray(found)[0]


def _read(file: str, smallest: int) -> np.ndarray:
  """An image as float32 RGB in 0 ... 1, [1, H, W, 3]."""
  try:
    image = read_image(file)
  except UnreadableError as error:
    raise UsageError(f'cannot read {file}: {error}') from None
  height, width = image.shape[:2]
  if min(height, width) < smallest:
    raise UsageError(f'{file} has {width}x{height} pixels; LPIPS needs at least {smallest}x{smallest}')
  return image[None].astype(np.float32) / 255


_compiled = jax.jit(lpips, static_argnums=(0, 5))
