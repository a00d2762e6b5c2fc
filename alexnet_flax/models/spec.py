"""A network as data: a tuple of frozen dataclasses, one per layer, from input to logits.

AlexNets differ in layer order, padding, groups, norms and constants. A tuple of layers states all of this
and reads like the paper. The networks are defined in `variants/`; `alexnet.py` applies their layers.
"""

import dataclasses
import functools
import itertools
import math
import typing
from typing import Any, Literal

from alexnet_flax.errors import UsageError, unknown_name

Padding = Literal['SAME', 'VALID'] | int
ActivationKind = Literal['relu', 'tanh', 'sigmoid', 'leaky_relu', 'elu']
PoolKind = Literal['max', 'avg', 'max+avg']


def _check_choices(layer: Any) -> None:
  """Raises UsageError, with the nearest, for a name that is not among a field's choices."""
  kind: Any = type(layer)
  for field, choices in _choices(kind):
    if isinstance(value := getattr(layer, field), str) and value not in choices:
      raise unknown_name(f'{kind.__name__}.{field}', value, choices)


@functools.cache
def _choices(kind: type) -> list[tuple[str, tuple[str, ...]]]:
  hints = typing.get_type_hints(kind).items()
  literals = [(field, one) for field, hint in hints for one in (hint, *typing.get_args(hint))]
  return [(field, typing.get_args(one)) for field, one in literals if typing.get_origin(one) is Literal]


@dataclasses.dataclass(frozen=True)
class Normal:
  """Weights drawn from N(0, stddev)."""

  stddev: float


@dataclasses.dataclass(frozen=True)
class VarianceScaling:
  """Weights of variance scale / fan, drawn by `jax.nn.initializers.variance_scaling`."""

  scale: float
  mode: Literal['fan_in', 'fan_avg']
  distribution: Literal['uniform', 'truncated_normal', 'normal']

  def __post_init__(self) -> None:
    _check_choices(self)


@dataclasses.dataclass(frozen=True)
class Constant:
  """Biases initialised to `value`."""

  value: float = 0.0


@dataclasses.dataclass(frozen=True)
class UniformFanIn:
  """Biases drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) of their layer's kernel: PyTorch's default."""


GLOROT_UNIFORM = VarianceScaling(1.0, 'fan_avg', 'uniform')
# PyTorch's kaiming_uniform(a=sqrt(5)): U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
TORCH_UNIFORM = VarianceScaling(1 / 3, 'fan_in', 'uniform')


@dataclasses.dataclass(frozen=True)
class Multipliers:
  """Factors on the learning rate and weight decay of one layer's parameters; a norm's scale is its kernel."""

  kernel_rate: float = 1.0
  bias_rate: float = 1.0
  kernel_decay: float = 1.0
  bias_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Conv:
  """A square convolution with bias. Each of the `groups` sees only its share of the input channels.

  A `local` one has a kernel and biases of its own at each place (cuda-convnet's layer 'local'), so that a
  network takes images of one size alone. Raises UsageError for a local one with groups.
  """

  features: int
  kernel_size: int
  strides: int = 1
  padding: Padding = 'SAME'
  ceil_mode: bool = False
  groups: int = 1
  local: bool = False
  kernel_init: Normal | VarianceScaling = GLOROT_UNIFORM
  bias_init: Constant | UniformFanIn = Constant()
  multipliers: Multipliers = Multipliers()

  def __post_init__(self) -> None:
    _check_choices(self)
    if self.local and self.groups > 1:
      raise UsageError(f'Conv.groups (={self.groups}) must be 1 where the layer is local')


@dataclasses.dataclass(frozen=True)
class Dense:
  """A fully connected layer with bias. `features=None` marks the head, with one logit per class."""

  features: int | None
  kernel_init: Normal | VarianceScaling = GLOROT_UNIFORM
  bias_init: Constant | UniformFanIn = Constant()
  multipliers: Multipliers = Multipliers()


@dataclasses.dataclass(frozen=True)
class Activation:
  """An activation function; its endpoint is named after its kind (relu1, tanh1, ...).

  leaky_relu has a slope of 0.01, elu (Clevert et al. 2016) an alpha of 1. Initial weights are those of the
  layers before, whatever the kind.
  """

  kind: ActivationKind = 'relu'

  def __post_init__(self) -> None:
    _check_choices(self)


@dataclasses.dataclass(frozen=True)
class Pool:
  """A square pooling window; averages exclude padding.

  'max+avg' is the mean of the two poolings of the same window: half of the sum that Mishkin et al. (2017,
  arXiv:1606.02228) found better than either. Raises UsageError for padding in which a whole window would lie.
  """

  kernel_size: int = 3
  strides: int = 2
  padding: Padding = 'VALID'
  ceil_mode: bool = False
  kind: PoolKind = 'max'

  def __post_init__(self) -> None:
    _check_choices(self)
    if isinstance(self.padding, int) and self.padding >= self.kernel_size:
      limit = f'kernel_size (={self.kernel_size})'
      raise UsageError(f'Pool.padding (={self.padding}) must be less than {limit}')


@dataclasses.dataclass(frozen=True)
class LocalResponseNorm:
  """Normalisation over `size` adjacent channels: b = a / (k + alpha * sum a^2)^beta.

  `alpha` multiplies the plain sum, as in the paper's section 3.3. For programs that divide alpha by the
  window size (Caffe, PyTorch, the 2012 program), the specs contain the divided value. Windows do not
  cross the borders between `groups` of channels.
  """

  size: int = 5
  k: float = 2.0
  alpha: float = 1e-4
  beta: float = 0.75
  groups: int = 1


@dataclasses.dataclass(frozen=True)
class SpatialResponseNorm:
  """Normalisation over a size x size window of each channel, by the same formula."""

  size: int
  k: float
  alpha: float
  beta: float


@dataclasses.dataclass(frozen=True)
class BatchNorm:
  """Batch normalisation; running = momentum * running + (1 - momentum) * batch."""

  momentum: float = 0.99
  epsilon: float = 1e-3
  affine: bool = True
  multipliers: Multipliers = Multipliers(kernel_decay=0.0)


@dataclasses.dataclass(frozen=True)
class Flatten:
  """[B, H, W, C] to [B, H*W*C]."""


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout: in training, sets values to 0 with probability `rate` and divides the others by 1 - rate."""

  rate: float = 0.5


LayerWithParameters = Conv | Dense | BatchNorm
Layer = LayerWithParameters | Activation | Pool | LocalResponseNorm | SpatialResponseNorm | Flatten | Dropout


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Converts uint8 RGB to the network's input: (pixel * scale - mean) / std, in `channel_order`.

  `mean` and `std` have the same channel order, and the units of the scaled pixels. In evaluation, the
  image is first resized and its centre cropped; the crop's side is `center_crop_share` of the short side.
  """

  scale: float = 1 / 255
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)
  channel_order: Literal['RGB', 'BGR'] = 'RGB'
  center_crop_share: float = 224 / 256

  def __post_init__(self) -> None:
    _check_choices(self)


@dataclasses.dataclass(frozen=True)
class Spec:
  """One network: its layers, image size, number of classes, preprocessing, and source."""

  name: str
  layers: tuple[Layer, ...]
  image_size: int
  source: str
  num_classes: int = 1000
  preprocessing: Preprocessing = Preprocessing()

  def scaled(self, width: float, image_size: int | None = None) -> 'Spec':
    """Returns the network with `width` times the channels, and another image size if one is given.

    Channels are rounded to a multiple of the network's groups, at least one per group. The head is unchanged.
    Raises ValueError if `width` is not positive.
    """
    if not (width > 0 and math.isfinite(width)):
      raise ValueError(f'width (={width}) must be positive')
    groups = math.lcm(*(layer.groups for layer in self.layers if hasattr(layer, 'groups')), 1)

    def scale(layer: Layer) -> Layer:
      if not isinstance(layer, Conv | Dense) or layer.features is None:
        return layer
      return dataclasses.replace(layer, features=max(round(layer.features * width / groups), 1) * groups)

    size = self.image_size if image_size is None else image_size
    return dataclasses.replace(self, layers=tuple(map(scale, self.layers)), image_size=size)

  def replace(self, kind: type, /, **changes: Any) -> 'Spec':
    """Returns the network with `changes` made in every layer of a kind; raises UsageError if there is none.

    >>> from alexnet_flax import VARIANTS
    >>> spec = VARIANTS['paper'].replace(Activation, kind='tanh').replace(Pool, kind='avg')
    >>> spec.layers[1], spec.layers[3].kind
    (Activation(kind='tanh'), 'avg')
    """
    if not any(isinstance(layer, kind) for layer in self.layers):
      theirs = ', '.join(dict.fromkeys(type(layer).__name__ for layer in self.layers))
      raise UsageError(f'{self.name} has no layer {kind.__name__} to replace; it has {theirs}')
    layers = tuple(
      dataclasses.replace(layer, **changes) if isinstance(layer, kind) else layer for layer in self.layers
    )
    return dataclasses.replace(self, layers=layers)

  def named_layers(self) -> tuple[tuple[str, Layer], ...]:
    """Returns (name, layer) pairs: conv1, relu1, norm1, pool1, ..., flatten, fc6, drop6.

    Weight layers are numbered consecutively. Every other layer has the number of the preceding weight layer,
    and a letter if there are several of its kind (norm1a, norm1b).
    """
    number, names = 0, []
    for layer in self.layers:
      number += isinstance(layer, Conv | Dense)
      names.append('flatten' if isinstance(layer, Flatten) else f'{layer_stem(layer)}{number}')
    letters = ['abcdefgh'[names[:i].count(n)] if names.count(n) > 1 else '' for i, n in enumerate(names)]
    return tuple(zip(map(str.__add__, names, letters), self.layers, strict=True))

  @property
  def head(self) -> str:
    """The name of the last layer, which computes the logits: 'fc8'."""
    return self.named_layers()[-1][0]

  def side_lengths(self, size: int) -> dict[str, int]:
    """Returns the side after each convolution and pooling for images of side `size`; 0 if nothing is left."""
    sides = {}
    for name, layer in self.named_layers():
      if isinstance(layer, Conv | Pool):
        size = sides[name] = output_side(layer, size)
        if size == 0:
          break
    return sides

  def smallest_image_size(self) -> int:
    """Returns the smallest side of a square image that leaves a value after the last pooling."""
    return next(size for size in itertools.count(1) if all(self.side_lengths(size).values()))

  def check_image_size(self, *sides: int) -> None:
    """Raises ValueError, naming the layer, if an image with these sides is too small for the network."""
    for name, left in self.side_lengths(min(sides)).items():
      if not left:
        smallest = self.smallest_image_size()
        why = f'nothing is left at {name}; it needs at least {smallest}x{smallest}'
        raise ValueError(
          f'an image of {"x".join(map(str, sides))} is too small for the network {self.name}: {why}'
        )


_STEMS: dict[type, str] = dict.fromkeys((LocalResponseNorm, SpatialResponseNorm, BatchNorm), 'norm')
_STEMS |= {Conv: 'conv', Dense: 'fc', Pool: 'pool', Flatten: 'flatten', Dropout: 'drop'}


def layer_stem(layer: Layer) -> str:
  """Returns the stem of a layer's name: 'conv', 'fc', 'relu', ..."""
  return layer.kind if isinstance(layer, Activation) else _STEMS[type(layer)]


def window_padding(layer: Conv | Pool, size: int) -> tuple[int, int]:
  """Returns the padding before and after a side of `size`, such that VALID windows give the layer's output.

  'SAME' gives ceil(size / strides) outputs, aligned as in XLA and TensorFlow. A number pads both ends.
  `ceil_mode` pads the end for a last, partial window if that window begins inside the image or its
  leading padding (Caffe's and PyTorch's rule).
  """
  window, strides = layer.kernel_size, layer.strides
  if layer.padding == 'SAME':
    total = max((math.ceil(size / strides) - 1) * strides + window - size, 0)
    return total // 2, total - total // 2
  pad = 0 if layer.padding == 'VALID' else layer.padding
  span = size + 2 * pad - window
  last_start = math.ceil(span / strides) * strides
  if not layer.ceil_mode or span < 0 or last_start >= size + pad:
    return pad, pad
  return pad, pad + last_start - span


def output_side(layer: Conv | Pool, size: int) -> int:
  """Returns the output side of a layer for an input side of `size`; 0 if nothing is left."""
  return max((size + sum(window_padding(layer, size)) - layer.kernel_size) // layer.strides + 1, 0)
