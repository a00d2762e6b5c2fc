"""Networks from other frameworks' model zoos and papers: for ImageNet, and for CIFAR-10."""

import dataclasses

from alexnet_flax.models.spec import (
  TORCH_UNIFORM,
  Activation,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Multipliers,
  Pool,
  Preprocessing,
  Spec,
  UniformFanIn,
)

_CIFAR10 = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), center_crop_share=1.0)


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


def cifar10_alexnet() -> Spec:
  """torchvision's convolutions for images of 32 pixels, without hidden layers. All parameters decay alike."""
  pool = Pool(kernel_size=2)

  def conv(features: int, kernel_size: int, padding: int, strides: int = 1) -> tuple[Layer, ...]:
    layer = Conv(features, kernel_size, strides, padding, kernel_init=TORCH_UNIFORM, bias_init=UniformFanIn())
    return (dataclasses.replace(layer, multipliers=Multipliers(bias_decay=1.0)), Activation())

  head = Dense(None, TORCH_UNIFORM, UniformFanIn(), Multipliers(bias_decay=1.0))
  return Spec(
    name='cifar10_alexnet',
    layers=(
      *(*conv(64, 11, padding=5, strides=4), pool),
      *(*conv(192, 5, padding=2), pool),
      *conv(384, 3, padding=1),
      *conv(256, 3, padding=1),
      *(*conv(256, 3, padding=1), pool, Flatten(), head),
    ),
    image_size=32,
    num_classes=10,
    source='bearpaw/pytorch-classification (models/cifar/alexnet.py)',
    preprocessing=_CIFAR10,
  )


def cifar10_small_alexnet() -> Spec:
  """The small AlexNet that Zhang et al. 2017 fit to random labels, for crops of 28 of 32 pixels.

  Initialisation and LRN's constants are not published: the constants are those of TensorFlow's tutorial for
  CIFAR-10, which has the same layers. There each image is whitened by its own mean and deviation.
  """
  norm, pool = LocalResponseNorm(size=9, k=1.0, alpha=0.001 / 9, beta=0.75), Pool(ceil_mode=True)
  return Spec(
    name='cifar10_small_alexnet',
    layers=(
      *((Conv(64, 5), Activation(), pool, norm) * 2),
      *(Flatten(), Dense(384), Activation(), Dense(192), Activation(), Dense(None)),
    ),
    image_size=28,
    num_classes=10,
    source='Zhang, Bengio, Hardt, Recht, Vinyals 2017 (arXiv:1611.03530), appendix A',
    preprocessing=dataclasses.replace(_CIFAR10, center_crop_share=28 / 32),
  )
