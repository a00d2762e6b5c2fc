"""Every AlexNet there is, by name. Differences between them are differences between these tuples.

Facts and sources of each variant stand in its `source`; `docs/family.md` compares them.
"""

from alexnet_flax.specs import (
  TORCH_UNIFORM,
  Activation,
  BatchNorm,
  Constant,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Normal,
  Pool,
  Preprocessing,
  Spec,
  UniformFanIn,
)

IMAGENET_MEAN_RGB_255 = (123.68, 116.779, 103.939)


def _batchnorm() -> Spec:
  """Convolution, ReLU, then BatchNorm; pooling after the norm; Keras's initialisation."""

  def stage(features: int, kernel_size: int, *rest: Layer, strides: int = 1) -> tuple[Layer, ...]:
    return (Conv(features, kernel_size, strides), Activation(), BatchNorm(), *rest)

  return Spec(
    name='batchnorm',
    layers=(
      *stage(96, 11, Pool(), strides=4),
      *stage(256, 5, Pool()),
      *stage(384, 3),
      *stage(384, 3),
      *stage(256, 3, Pool()),
      Flatten(),
      *(Dense(4096), Activation(), Dropout()),
      *(Dense(4096), Activation(), Dropout()),
      Dense(None),
    ),
    image_size=224,
    source="the article's Keras model; 62,383,848 parameters and statistics as Keras 3.15.1 counts them",
  )


def _batchnorm_prose() -> Spec:
  """Our reading of the article's text, where it differs from the article's code.

  The text gives every one of the five stages two normalisations and a pooling, and a normalisation
  before each fully connected layer. We read the two as LRN then BatchNorm. Convolutions and pools
  are SAME (57, 29, 15, 8, 4, 2): with VALID pools nothing would be left of the fifth stage. BatchNorm
  comes before dropout, whose noise would otherwise shift the statistics. The text calls 227x227x3
  the first fully connected layer's input, an evident slip for the network's.
  """

  def stage(features: int, kernel_size: int, strides: int = 1) -> tuple[Layer, ...]:
    return (
      Conv(features, kernel_size, strides),
      Activation(),
      LocalResponseNorm(),
      BatchNorm(),
      Pool(padding='SAME'),
    )

  return Spec(
    name='batchnorm_prose',
    layers=(
      *stage(96, 11, strides=4),
      *stage(256, 5),
      *stage(384, 3),
      *stage(384, 3),
      *stage(256, 3),
      *(Flatten(), BatchNorm()),
      *(Dense(4096), Activation(), BatchNorm(), Dropout()),
      *(Dense(4096), Activation(), BatchNorm(), Dropout()),
      Dense(None),
    ),
    image_size=227,
    source="the article's text, read as the docstring says; 28,845,096 parameters, 21,184 statistics",
  )


def _paper() -> Spec:
  """Krizhevsky, Sutskever, Hinton 2012 as written: two groups in conv2, 4, 5, LRN after ReLU 1 and 2.

  The paper's 224 pixels give its 55x55 after conv1 only with 2 pixels of padding; that is what we do
  (Caffe crops 227 instead). Of the mean activity we subtract each colour's mean.
  """
  init = Normal(0.01)
  ones = Constant(1.0)
  return Spec(
    name='paper',
    layers=(
      *(Conv(96, 11, 4, padding=2, kernel_init=init), Activation(), LocalResponseNorm(), Pool()),
      *(Conv(256, 5, groups=2, kernel_init=init, bias_init=ones), Activation()),
      *(LocalResponseNorm(), Pool()),
      *(Conv(384, 3, kernel_init=init), Activation()),
      *(Conv(384, 3, groups=2, kernel_init=init, bias_init=ones), Activation()),
      *(Conv(256, 3, groups=2, kernel_init=init, bias_init=ones), Activation(), Pool()),
      Flatten(),
      *(Dense(4096, kernel_init=init, bias_init=ones), Activation(), Dropout()),
      *(Dense(4096, kernel_init=init, bias_init=ones), Activation(), Dropout()),
      Dense(None, kernel_init=init),
    ),
    image_size=224,
    source='Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep CNNs, NIPS 2012, sections 3-5',
    preprocessing=Preprocessing(1.0, IMAGENET_MEAN_RGB_255, (1.0, 1.0, 1.0)),
  )


def _torchvision() -> Spec:
  """'One weird trick' channels, no LRN, dropout before fc6 and fc7, PyTorch's initialisation."""

  def conv(features: int, kernel_size: int, padding: int, strides: int = 1) -> tuple[Layer, ...]:
    init, bias = TORCH_UNIFORM, UniformFanIn()
    return (
      Conv(features, kernel_size, strides, padding, kernel_init=init, bias_init=bias),
      Activation(),
    )

  def dense(features: int | None) -> Dense:
    return Dense(features, kernel_init=TORCH_UNIFORM, bias_init=UniformFanIn())

  return Spec(
    name='torchvision',
    layers=(
      *conv(64, 11, padding=2, strides=4),
      Pool(),
      *conv(192, 5, padding=2),
      Pool(),
      *conv(384, 3, padding=1),
      *conv(256, 3, padding=1),
      *conv(256, 3, padding=1),
      Pool(),
      Flatten(),
      *(Dropout(), dense(4096), Activation()),
      *(Dropout(), dense(4096), Activation()),
      dense(None),
    ),
    image_size=224,
    source='torchvision.models.alexnet (torchvision/models/alexnet.py); 61,100,840 parameters',
  )


VARIANTS: dict[str, Spec] = {
  spec.name: spec for spec in (_batchnorm(), _batchnorm_prose(), _paper(), _torchvision())
}
