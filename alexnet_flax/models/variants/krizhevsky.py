"""Alex Krizhevsky's own networks: the paper, the program behind it, and related networks.

His programs round the sizes of convolutions and pools up, give biases twice the learning rate, and apply
weight decay to weights only. Their local norms divide `scale` by the window size.
"""

import dataclasses

from alexnet_flax.models.spec import (
  Activation,
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
  SpatialResponseNorm,
  Spec,
)

_IMAGENET = Preprocessing(1.0, (123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
_CIFAR10 = Preprocessing(1.0, (125.307, 122.950, 113.865), (1.0, 1.0, 1.0), center_crop_share=1.0)
_BIAS_TWICE = Multipliers(bias_rate=2.0)  # epsB = 0.02 where epsW = 0.01
_NO_DECAY = Multipliers(bias_rate=2.0, kernel_decay=0.0)
_POOL = Pool(ceil_mode=True)


def paper() -> Spec:
  """Krizhevsky, Sutskever, Hinton 2012 as published: two groups in conv2, 4, 5, LRN after ReLU 1 and 2.

  The paper's 224 pixels give its 55x55 after conv1 only with 2 pixels of padding, which we add (Caffe
  crops 227 instead). Instead of the mean image we subtract the mean of each channel.
  """
  init, ones = Normal(0.01), Constant(1.0)
  return Spec(
    name='paper',
    layers=(
      *(Conv(96, 11, 4, padding=2, kernel_init=init), Activation(), LocalResponseNorm(), Pool()),
      *(Conv(256, 5, groups=2, kernel_init=init, bias_init=ones), Activation(), LocalResponseNorm(), Pool()),
      *(Conv(384, 3, kernel_init=init), Activation()),
      *(Conv(384, 3, groups=2, kernel_init=init, bias_init=ones), Activation()),
      *(Conv(256, 3, groups=2, kernel_init=init, bias_init=ones), Activation(), Pool()),
      Flatten(),
      *((Dense(4096, kernel_init=init, bias_init=ones), Activation(), Dropout()) * 2),
      Dense(None, kernel_init=init),
    ),
    image_size=224,
    source='Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep CNNs, NIPS 2012, sections 3-5',
    preprocessing=_IMAGENET,
  )


def original_code() -> Spec:
  """The 2012 program, which differs from the paper: conv1, LRN, pool, and only then ReLU.

  The network consists of two columns, one per GPU, and LRN does not cross columns. conv2 has a second,
  spatial norm. The program subtracts a mean image, we the mean of each channel. It halves the outputs of
  fc6 and fc7 in testing, which is equivalent to our doubling them in training.
  """
  norm = LocalResponseNorm(size=5, k=2.0, alpha=1e-4 / 5, beta=0.75, groups=2)
  spatial = SpatialResponseNorm(size=5, k=1.0, alpha=0.001 / 25, beta=0.75)
  return Spec(
    name='original_code',
    layers=(
      *(_conv(96, 11, 0.01, strides=4, padding='VALID', ceil_mode=True), norm, _POOL, Activation()),
      *(_conv(256, 5, 0.01, bias=1.0, groups=2), Activation(), norm, spatial, _POOL),
      *(_conv(384, 3, 0.03), Activation()),
      *(_conv(384, 3, 0.03, bias=1.0, groups=2), Activation()),
      *(_conv(256, 3, 0.03, bias=1.0, groups=2), _POOL, Activation()),
      *(Flatten(), *_hidden_layers(), _dense(None)),
    ),
    image_size=224,
    source='computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145.cfg',
    preprocessing=_IMAGENET,
  )


def one_weird_trick() -> Spec:
  """The single-column network of 'One weird trick for parallelizing CNNs' (Krizhevsky 2014).

  It has torchvision's channels, and the norms that torchvision omits. fc8's biases start at -7 for the
  program's second loss, one logistic unit per class.
  """
  norm = LocalResponseNorm(size=5, k=2.0, alpha=1e-4 / 5, beta=0.75)
  return Spec(
    name='one_weird_trick',
    layers=(
      *(_conv(64, 11, 0.01, strides=4, padding='VALID', ceil_mode=True), norm, _POOL, Activation()),
      *(_conv(192, 5, 0.01, bias=1.0), Activation(), norm, _POOL),
      *(_conv(384, 3, 0.03), Activation()),
      *(_conv(256, 3, 0.03, bias=1.0), Activation()),
      *(_conv(256, 3, 0.03, bias=1.0), _POOL, Activation()),
      *(Flatten(), *_hidden_layers(), _dense(None, bias=-7.0)),
    ),
    image_size=224,
    source='akrizhevsky/cuda-convnet2, layers/layers-imagenet-1gpu.cfg; arXiv:1404.5997',
    preprocessing=_IMAGENET,
  )


def cifar10_full() -> Spec:
  """The small network for CIFAR-10 with 18 % test error; Caffe's cifar10_full has the same shape.

  The programs pool before the first ReLU, which gives the same values. fc4 has 250 times the weight decay of
  the convolutions (1 instead of 0.004).
  """
  norm = SpatialResponseNorm(size=3, k=1.0, alpha=5e-5 / 9, beta=0.75)
  average = Pool(ceil_mode=True, kind='avg')
  head = Multipliers(bias_rate=2.0, kernel_decay=1 / 0.004)
  return Spec(
    name='cifar10_full',
    layers=(
      *(_conv(32, 5, 1e-4), Activation(), _POOL, norm),
      *(_conv(32, 5, 0.01), Activation(), average, norm),
      *(_conv(64, 5, 0.01), Activation(), average),
      *(Flatten(), Dense(None, kernel_init=Normal(0.01), multipliers=head)),
    ),
    image_size=32,
    num_classes=10,
    source='cuda-convnet, example-layers/layers-18pct.cfg and layer-params-18pct.cfg',
    preprocessing=_CIFAR10,
  )


def cifar10_80sec() -> Spec:
  """The small network for CIFAR-10 with 26 % test error after 80 seconds on a GPU of 2012.

  `cifar10_full` without norms, with a hidden layer. The program pools before the first ReLU, which gives the
  same values. The fully connected layers have 7.5 times the weight decay of the convolutions (0.03, 0.004).
  """
  average, init = Pool(ceil_mode=True, kind='avg'), Normal(0.1)
  decay = Multipliers(bias_rate=2.0, kernel_decay=0.03 / 0.004)
  return Spec(
    name='cifar10_80sec',
    layers=(
      *(_conv(32, 5, 1e-4), Activation(), _POOL),
      *(_conv(32, 5, 0.01), Activation(), average),
      *(_conv(64, 5, 0.01), Activation(), average),
      *(Flatten(), Dense(64, init, multipliers=decay), Activation(), Dense(None, init, multipliers=decay)),
    ),
    image_size=32,
    num_classes=10,
    source='cuda-convnet, example-layers/layers-80sec.cfg and layer-params-80sec.cfg',
    preprocessing=_CIFAR10,
  )


def cifar10_four_convs() -> Spec:
  """Four convolutions and a classifier: figure 1 of the 2012 paper, ReLU against tanh.

  The paper says 'a four-layer convolutional neural network' and no more. As in its network for ImageNet,
  conv1 has a stride, initial weights have a standard deviation of 0.01 (section 5), and inputs are pixels
  less their mean. Rates and decay of all layers are equal.
  """
  init = Normal(0.01)
  return Spec(
    name='cifar10_four_convs',
    layers=(
      *(Conv(32, 5, strides=2, padding=2, kernel_init=init), Activation()),
      *(Conv(32, 3, kernel_init=init), Activation(), _POOL),
      *(Conv(64, 3, kernel_init=init), Activation()),
      *(Conv(64, 3, kernel_init=init), Activation(), _POOL),
      *(Flatten(), Dense(None, init)),
    ),
    image_size=32,
    num_classes=10,
    source='after Krizhevsky et al. 2012, section 3.1 and figure 1',
    preprocessing=_CIFAR10,
  )


def cifar10_local() -> Spec:
  """Two convolutions, two local ones and a classifier, without norms: 13 % test error on CIFAR-10.

  The 'four-layer CNN' of the 2012 paper's section 3.3. It is trained on windows of 24 pixels of the images,
  mirrored or not, and tested on ten of them. The convolutions have no weight decay.
  """
  return Spec(
    name='cifar10_local',
    layers=(
      *(_conv(64, 5, 1e-4, multipliers=_NO_DECAY), Activation(), _POOL),
      *(_conv(64, 5, 0.01, multipliers=_NO_DECAY), Activation(), _POOL),
      *((_conv(32, 3, 0.04, local=True), Activation()) * 2),
      *(Flatten(), _dense(None)),
    ),
    image_size=24,
    num_classes=10,
    source='cuda-convnet, example-layers/layers-conv-local-13pct.cfg and layer-params-conv-local-13pct.cfg',
    preprocessing=dataclasses.replace(_CIFAR10, center_crop_share=24 / 32),
  )


def cifar10_local_lrn() -> Spec:
  """`cifar10_local` with LRN, after the first pool and before the second: 11 % test error.

  conv3 has twice the features, and fc5 2.5 times the weight decay (0.01 in the place of 0.004).
  """
  norm = LocalResponseNorm(size=9, k=1.0, alpha=0.001 / 9, beta=0.75)
  decay = Multipliers(bias_rate=2.0, kernel_decay=0.01 / 0.004)
  return dataclasses.replace(
    cifar10_local(),
    name='cifar10_local_lrn',
    layers=(
      *(_conv(64, 5, 1e-4, multipliers=_NO_DECAY), Activation(), _POOL, norm),
      *(_conv(64, 5, 0.01, multipliers=_NO_DECAY), Activation(), norm, _POOL),
      *(_conv(64, 3, 0.04, local=True), Activation()),
      *(_conv(32, 3, 0.04, local=True), Activation()),
      *(Flatten(), Dense(None, Normal(0.01), multipliers=decay)),
    ),
    source='cuda-convnet, example-layers/layers-conv-local-11pct.cfg and layer-params-conv-local-11pct.cfg',
  )


def _conv(features: int, kernel_size: int, stddev: float, bias: float = 0.0, **others) -> Conv:
  init, biases = Normal(stddev), Constant(bias)
  return Conv(
    features, kernel_size, kernel_init=init, bias_init=biases, **{'multipliers': _BIAS_TWICE, **others}
  )


def _dense(features: int | None, bias: float = 0.0) -> Dense:
  return Dense(features, Normal(0.01), Constant(bias), _BIAS_TWICE)


def _hidden_layers() -> tuple[Layer, ...]:
  return (_dense(4096, bias=1.0), Activation(), Dropout()) * 2
