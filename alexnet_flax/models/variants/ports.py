"""Networks from other frameworks' model zoos: torchvision's, and the most accurate one published."""

from alexnet_flax.models.spec import (
  TORCH_UNIFORM,
  Activation,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Pool,
  Spec,
  UniformFanIn,
)


def torchvision() -> Spec:
  """The channels of 'One weird trick', no LRN, dropout before fc6 and fc7, PyTorch's initialisation."""

  def conv(features: int, kernel_size: int, padding: int, strides: int = 1) -> tuple[Layer, ...]:
    init, bias = TORCH_UNIFORM, UniformFanIn()
    return (Conv(features, kernel_size, strides, padding, kernel_init=init, bias_init=bias), Activation())

  def dense(features: int | None) -> Dense:
    return Dense(features, kernel_init=TORCH_UNIFORM, bias_init=UniformFanIn())

  return Spec(
    name='torchvision',
    layers=(
      *(*conv(64, 11, padding=2, strides=4), Pool()),
      *(*conv(192, 5, padding=2), Pool()),
      *conv(384, 3, padding=1),
      *conv(256, 3, padding=1),
      *(*conv(256, 3, padding=1), Pool(), Flatten()),
      *((Dropout(), dense(4096), Activation()) * 2),
      dense(None),
    ),
    image_size=224,
    source='torchvision.models.alexnet (torchvision/models/alexnet.py)',
  )


def ungrouped() -> Spec:
  """The paper's channels without its groups: the best published top-1 of an AlexNet, 61.93 %.

  conv1 has no padding and turns 224 into 54x54; pools round up. LRN's constants are MXNet's defaults, whose
  alpha is divided by the window size. Its initialisation is not published; we use Glorot's.
  """
  norm, pool = LocalResponseNorm(size=5, k=2.0, alpha=1e-4 / 5, beta=0.75), Pool(ceil_mode=True)
  return Spec(
    name='ungrouped',
    layers=(
      *(Conv(96, 11, 4, 'VALID'), Activation(), norm, pool),
      *(Conv(256, 5), Activation(), norm, pool),
      *(Conv(384, 3), Activation()),
      *(Conv(384, 3), Activation()),
      *(Conv(256, 3), Activation(), pool),
      Flatten(),
      *((Dense(4096), Activation(), Dropout()) * 2),
      Dense(None),
    ),
    image_size=224,
    source="osmr/imgclsmob, 'alexnet' (gluon/gluoncv2/models/alexnet.py)",
  )
