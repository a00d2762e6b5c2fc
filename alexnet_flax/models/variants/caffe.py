"""Caffe's two AlexNets, which differ by accident, and a BatchNorm network that was trained with Caffe.

Caffe crops 227 pixels, reads BGR in 0..255, rounds the sizes of pools up, divides LRN's alpha by the
window size, and gives biases twice the learning rate and no weight decay. Instead of its mean image we
subtract the mean of each channel.
"""

from alexnet_flax.models.spec import (
  Activation,
  BatchNorm,
  Constant,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Layer,
  LocalResponseNorm,
  Multipliers,
  Normal,
  Pool,
  Preprocessing,
  Spec,
  VarianceScaling,
)

_POOL = Pool(ceil_mode=True)
_NORM = LocalResponseNorm(size=5, k=1.0, alpha=1e-4 / 5, beta=0.75)
_BIAS_TWICE = Multipliers(bias_rate=2.0)
_UNIT = (1.0, 1.0, 1.0)
_BGR_MEAN = Preprocessing(1.0, (104.007, 116.669, 122.679), _UNIT, 'BGR', center_crop_share=227 / 256)
_BGR = Preprocessing(1.0, (0.0, 0.0, 0.0), _UNIT, 'BGR', center_crop_share=227 / 256)


def caffe() -> Spec:
  """bvlc_alexnet: LRN, then pooling, as in the paper; biases of 0.1 where the paper has 1."""
  return _bvlc('caffe', 'models/bvlc_alexnet', (_NORM, _POOL), bias=0.1)


def caffenet() -> Spec:
  """bvlc_reference_caffenet: pooling, then LRN; biases of 1."""
  return _bvlc('caffenet', 'models/bvlc_reference_caffenet', (_POOL, _NORM), bias=1.0)


def batchnorm_grouped() -> Spec:
  """BatchNorm before each ReLU, and on the input instead of mean subtraction; no dropout.

  Only the input's norm has a scale and a shift. The published running moments are Caffe's, with a
  bias-corrected average and the unbiased variance; networks trained here have linen's. The published network
  was trained with batches of 128, accumulating the gradients of two.
  """
  norm = BatchNorm(momentum=0.9, epsilon=1e-5, affine=False)
  first = BatchNorm(momentum=0.9, epsilon=1e-5, multipliers=_BIAS_TWICE)  # Caffe's 'Scale' decays
  he = VarianceScaling(2.0, 'fan_in', 'normal')

  def conv(features: int, kernel_size: int, **geometry) -> tuple[Layer, ...]:
    kernel = Conv(features, kernel_size, kernel_init=he, multipliers=_BIAS_TWICE, **geometry)
    return (kernel, norm, Activation())

  def dense() -> tuple[Layer, ...]:
    return (Dense(4096, he, multipliers=_BIAS_TWICE), norm, Activation())

  return Spec(
    name='batchnorm_grouped',
    layers=(
      first,
      *(*conv(96, 11, strides=4, padding='VALID'), _POOL),
      *(*conv(256, 5, groups=2), _POOL),
      *conv(384, 3),
      *conv(384, 3, groups=2),
      *(*conv(256, 3, groups=2), _POOL),
      *(Flatten(), *dense(), *dense(), Dense(None, he, multipliers=_BIAS_TWICE)),
    ),
    image_size=227,
    source='cvjena/cnn-models, AlexNet_cvgj/train.prototxt; arXiv:1612.01452',
    preprocessing=_BGR,
  )


def _bvlc(name: str, folder: str, after_relu: tuple[Layer, ...], bias: float) -> Spec:
  """Returns a BVLC network, given the layers after the first two ReLUs and the non-zero bias."""

  def conv(features: int, kernel_size: int, bias: float = 0.0, **geometry) -> tuple[Layer, ...]:
    init, fill = Normal(0.01), Constant(bias)
    conv = Conv(features, kernel_size, kernel_init=init, bias_init=fill, multipliers=_BIAS_TWICE, **geometry)
    return (conv, Activation())

  def dense() -> tuple[Layer, ...]:
    return (Dense(4096, Normal(0.005), Constant(bias), _BIAS_TWICE), Activation(), Dropout())

  return Spec(
    name=name,
    layers=(
      *(*conv(96, 11, strides=4, padding='VALID'), *after_relu),
      *(*conv(256, 5, bias, groups=2), *after_relu),
      *(*conv(384, 3), *conv(384, 3, bias, groups=2)),
      *(*conv(256, 3, bias, groups=2), _POOL),
      *(Flatten(), *dense(), *dense(), Dense(None, Normal(0.01), multipliers=_BIAS_TWICE)),
    ),
    image_size=227,
    source=f'BVLC/caffe, {folder}/train_val.prototxt',
    preprocessing=_BGR_MEAN,
  )
