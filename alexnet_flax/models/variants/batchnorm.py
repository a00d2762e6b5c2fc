"""AlexNet with batch normalization, the default network, in two versions.

Both come from the article of 禅与计算机程序设计艺术, a Chinese tutorial with a Keras model, whose code and
text describe different networks.
"""

from alexnet_flax.models.spec import (
  Activation,
  BatchNorm,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Pool,
  Spec,
)


def batchnorm() -> Spec:
  """The tutorial's Keras model: convolution, ReLU, BatchNorm, pooling, with Keras's initialisation.

  Keras 3.15.1 counts 62,383,848 parameters and statistics.
  """

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
      *((Dense(4096), Activation(), Dropout()) * 2),
      Dense(None),
    ),
    image_size=224,
    source='a Chinese tutorial, its Keras model; named in alexnet_flax/models/variants/batchnorm.py',
  )


def batchnorm_prose() -> Spec:
  """Our interpretation of the tutorial's text, which differs from its code.

  The text gives each of the five stages two normalisations and a pooling, and a normalisation before each
  fully connected layer. We interpret the two as LRN followed by BatchNorm. Convolutions and pools are SAME
  (57, 29, 15, 8, 4, 2): with VALID pools, nothing would be left in the fifth stage. BatchNorm precedes
  dropout, whose noise would otherwise shift the statistics. The text calls 227x227x3 the input of the first
  fully connected layer; the network's input is clearly meant.
  """

  def stage(features: int, kernel_size: int, strides: int = 1) -> tuple[Layer, ...]:
    conv = Conv(features, kernel_size, strides)
    return (conv, Activation(), LocalResponseNorm(), BatchNorm(), Pool(padding='SAME'))

  return Spec(
    name='batchnorm_prose',
    layers=(
      *stage(96, 11, strides=4),
      *stage(256, 5),
      *stage(384, 3),
      *stage(384, 3),
      *stage(256, 3),
      *(Flatten(), BatchNorm()),
      *((Dense(4096), Activation(), BatchNorm(), Dropout()) * 2),
      Dense(None),
    ),
    image_size=227,
    source='the same tutorial, its text as interpreted in alexnet_flax/models/variants/batchnorm.py',
  )
