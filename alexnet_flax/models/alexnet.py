"""One linen module for the whole family: it applies the layers of a spec in order."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, assert_never

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding

from alexnet_flax.errors import unknown_name
from alexnet_flax.models import cpu_conv, layers
from alexnet_flax.models import spec as specs
from alexnet_flax.models.batch_norm import BatchNorm
from alexnet_flax.models.spec import Spec, window_padding
from alexnet_flax.models.variants import VARIANTS

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # but 'relu', which the module has
  'tanh': nn.tanh,
  'sigmoid': nn.sigmoid,
  'leaky_relu': nn.leaky_relu,
  'elu': nn.elu,
}


_Named = tuple[str, specs.Layer]


class AlexNet(nn.Module):
  """The network that a spec describes.

  Attributes:
    spec: One of `VARIANTS`, or your own.
    num_classes: The number of logits; the spec's own number if None.
    dtype: float32 or bfloat16, for the arithmetic between input and logits. Parameters, running
      statistics, the norms' sums and the logits are always float32.
    axis_name: The mapped axis over which BatchNorm computes its moments, under `jax.pmap`. Not needed
      under `jax.jit`, where BatchNorm sees the whole batch.
    fixed_norms: BatchNorm layers that also use their running statistics in training, without updating them.
    dense_input_sharding: Under `jax.jit`, where the inputs [B, F] of the fully connected layers are to be, if
      their parameters are divided over devices; None leaves it to XLA.
    relu: What the activations 'relu' compute: ReLU, or the same with a derivative of another kind, by which
      guided backpropagation differs from the gradient.

  >>> import jax, jax.numpy as jnp
  >>> from alexnet_flax import AlexNet, VARIANTS
  >>> model = AlexNet(VARIANTS['torchvision'].scaled(1 / 16), num_classes=10)
  >>> images = jnp.zeros([2, 67, 67, 3])
  >>> variables = model.init(jax.random.key(0), images, train=False)
  >>> logits, taps = model.apply(variables, images, train=False, endpoints=True)
  >>> logits.shape, taps['conv1'].shape
  ((2, 10), (2, 16, 16, 4))
  """

  spec: Spec
  num_classes: int | None = None
  dtype: Any = jnp.float32
  axis_name: str | None = None
  fixed_norms: tuple[str, ...] = ()
  dense_input_sharding: NamedSharding | None = None
  relu: Callable[[jax.Array], jax.Array] = layers.relu

  def __post_init__(self) -> None:
    """Raises TypeError for the name of a variant in place of its spec."""
    if not isinstance(self.spec, Spec):
      shown = VARIANTS[self.spec].name if isinstance(self.spec, str) else 'torchvision'
      raise TypeError(f'spec (={self.spec!r}) must be a Spec: AlexNet(VARIANTS[{shown!r}])')
    super().__post_init__()

  @classmethod
  def from_pretrained(cls, source: str, **options: Any) -> NoReturn:
    """Raises TypeError: a linen module has no parameters, so `load_pretrained` returns them beside it."""
    loaded = f'load_pretrained({source!r})'
    raise TypeError(f'a linen module has no parameters; use {loaded}, which has .model and .variables')

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool,
    endpoints: bool = False,
    perturbations: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the logits of a batch of images.

    Args:
      images: float [B, H, W, 3], preprocessed according to `spec.preprocessing`.
      train: Whether to use batch statistics and dropout (needs `rngs={'dropout': key}`, and
        `mutable=['batch_stats']` if the spec has BatchNorm).
      endpoints: Whether to also return every layer's output.
      perturbations: Arrays to add to the outputs of layers, by layer name. The gradient with respect to a
        perturbation of zeros is the gradient with respect to that layer's output.

    Returns:
      float32 logits [B, num_classes], without softmax; with `endpoints`, also a dictionary of every
      layer's output by name ('conv1', 'relu1', ..., 'fc8').

    Raises:
      UsageError: There is no layer of a name in `perturbations` or `fixed_norms`.
      ValueError: The shape is not [B, H, W, 3], or H or W is too small for the network.
      TypeError: The images are integers, so have not been preprocessed.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(f'images (of shape {images.shape}) must have shape [B, H, W, 3]')
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise TypeError(
        f'images (of dtype {images.dtype}) must be floats: apply the preprocessing of the spec first'
      )
    self.spec.check_image_size(*images.shape[1:3])
    layers_by_name = dict(self.spec.named_layers())
    norms = [name for name, layer in layers_by_name.items() if isinstance(layer, specs.BatchNorm)]
    for name in set(perturbations or ()) - set(layers_by_name):
      raise unknown_name('layer to perturb', name, layers_by_name)
    for name in set(self.fixed_norms) - set(norms):
      raise unknown_name('BatchNorm to fix', name, norms)
    x = images.astype(self.dtype)
    taps = {}
    one_by_one = perturbations or self.relu is not layers.relu
    groups = [[one] for one in layers_by_name.items()] if one_by_one else _with_pools(layers_by_name)
    for group in groups:
      for (name, _), output in zip(group, self._apply_group(group, x, train), strict=True):
        added = perturbations.get(name) if perturbations else None
        x = output if added is None else output + added.astype(output.dtype)
        taps[name] = x
    taps[name] = logits = layers.at_least_float32(x)
    return (logits, taps) if endpoints else logits

  def _apply_group(self, group: list[_Named], x: jax.Array, train: bool) -> list[jax.Array]:
    """Returns the outputs of consecutive layers; a compiler leaves out those that are not used."""
    if len(group) == 1:
      (name, layer), *_ = group
      with jax.named_scope(name):
        return [self._apply(name, layer, x, train)]
    *before, (name, pool) = group
    assert isinstance(pool, specs.Pool)
    rectified = _is_relu(before[0][1])
    with jax.named_scope(name):
      outputs = [layers.relu(x)] if rectified else []
      match before[-1]:
        case name, specs.BatchNorm() as norm:
          return [*outputs, *self._batch_norm(name, norm, train)(x, pool, rectified)]
        case _:
          return [*outputs, layers.max_pool(x, pool, rectified)]

  def _apply(self, name: str, layer: specs.Layer, x: jax.Array, train: bool) -> jax.Array:
    match layer:
      case specs.Conv():
        fan_in = layer.kernel_size**2 * x.shape[-1] // layer.groups
        bias_init = _bias_init(layer.bias_init, fan_in)
        if layer.local:
          kernel_init = _kernel_init(layer.kernel_init, batch_axis=(0, 1))
          return layers.LocalConv(layer, self.dtype, kernel_init, bias_init, name=name)(x)
        return nn.Conv(
          layer.features,
          (layer.kernel_size, layer.kernel_size),
          (layer.strides, layer.strides),
          [window_padding(layer, side) for side in x.shape[1:3]],
          feature_group_count=layer.groups,
          dtype=self.dtype,
          kernel_init=_kernel_init(layer.kernel_init),
          bias_init=bias_init,
          conv_general_dilated_cls=lambda: cpu_conv.convolve,
          name=name,
        )(x)
      case specs.Dense():
        if self.dense_input_sharding is not None:
          x = jax.lax.with_sharding_constraint(x, self.dense_input_sharding)
        return nn.Dense(
          layer.features or self.num_classes or self.spec.num_classes,
          dtype=self.dtype,
          promote_dtype=layers.leave_kernel,
          dot_general=layers.product,
          kernel_init=_kernel_init(layer.kernel_init),
          bias_init=_bias_init(layer.bias_init, x.shape[-1]),
          name=name,
        )(x)
      case specs.BatchNorm():
        return self._batch_norm(name, layer, train)(x)[0]
      case specs.Dropout():
        return layers.Dropout(layer.rate, name=name)(x, train=train)
      case specs.Activation():
        return self.relu(x) if layer.kind == 'relu' else ACTIVATIONS[layer.kind](x)
      case specs.Pool():
        return layers.pool(x, layer)
      case specs.LocalResponseNorm():
        return layers.local_response_norm(x, layer)
      case specs.SpatialResponseNorm():
        return layers.spatial_response_norm(x, layer)
      case specs.Flatten():
        return x.reshape(x.shape[0], -1)
      case _:
        assert_never(layer)

  def _batch_norm(self, name: str, layer: specs.BatchNorm, train: bool) -> BatchNorm:
    return BatchNorm(
      use_running_average=not train or name in self.fixed_norms,
      axis_name=self.axis_name,
      momentum=layer.momentum,
      epsilon=layer.epsilon,
      dtype=self.dtype,
      affine=layer.affine,
      name=name,
    )


def _is_relu(layer: specs.Layer) -> bool:
  return isinstance(layer, specs.Activation) and layer.kind == 'relu'


def _with_pools(layers_by_name: Mapping[str, specs.Layer]) -> list[list[_Named]]:
  """Groups each max pool with the BatchNorm and the relu before it: all are computed from the group's input.

  Pooled first, only a quarter of the values is normalized and rectified: to the same values.
  """
  groups: list[list[_Named]] = []
  for name, layer in layers_by_name.items():
    group = [(name, layer)]
    if isinstance(layer, specs.Pool) and layer.kind == 'max':
      for goes_before in (lambda layer: isinstance(layer, specs.BatchNorm), _is_relu):
        if groups and goes_before(groups[-1][-1][1]):
          group = groups.pop() + group
    groups.append(group)
  return groups


def _kernel_init(
  init: specs.Normal | specs.VarianceScaling, batch_axis: tuple[int, ...] = ()
) -> Callable[..., jax.Array]:
  if isinstance(init, specs.Normal):
    return nn.initializers.normal(init.stddev)
  return nn.initializers.variance_scaling(init.scale, init.mode, init.distribution, batch_axis=batch_axis)


def _bias_init(init: specs.Constant | specs.UniformFanIn, fan_in: int) -> Callable[..., jax.Array]:
  if isinstance(init, specs.Constant):
    return nn.initializers.constant(init.value)
  bound = fan_in**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
