"""The article's two networks: what its Keras code builds, and what its text describes."""

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


def batchnorm_prose() -> Spec:
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
    source="the article's text, in our reading of it (alexnet_flax/variants/article.py)",
  )
