"""Alex Krizhevsky's own networks: the paper, the program behind it, and two of its relatives.

His programs round the sizes of convolutions and pools up, give biases twice the weights' rate, and
let weights alone decay. Their local norms divide `scale` by the window's size.
"""

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
_POOL = Pool(ceil_mode=True)


def paper() -> Spec:
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
    preprocessing=_IMAGENET,
  )


def original_code() -> Spec:
  """The 2012 program, which differs from its paper: conv1, LRN, pool, and only then ReLU.

  The network lies in two columns, one a GPU, and the LRN of a column does not see the other. After
  conv2's comes a second norm, over space. The program subtracts a mean image, we each colour's mean;
  it halves fc6's and fc7's values in testing, which is the same as our doubling them in training.
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
      Flatten(),
      *_hidden_layers(),
      _dense(None),
    ),
    image_size=224,
    source='computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145.cfg',
    preprocessing=_IMAGENET,
  )


def one_weird_trick() -> Spec:
  """The one-column network of 'One weird trick for parallelizing CNNs' (Krizhevsky 2014).

  torchvision's channels, with the norms that torchvision leaves out. fc8's biases start at -7 for the
  program's second cost, one logistic unit a class.
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
      Flatten(),
      *_hidden_layers(),
      _dense(None, bias=-7.0),
    ),
    image_size=224,
    source='akrizhevsky/cuda-convnet2, layers/layers-imagenet-1gpu.cfg; arXiv:1404.5997',
    preprocessing=_IMAGENET,
  )


def cifar10_full() -> Spec:
  """The small network for CIFAR-10, 18 % test error; Caffe's cifar10_full has the same shape.

  The programs pool before the first ReLU, which gives the same values. fc4 decays 250 times as fast
  as the convolutions (1 against 0.004).
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
      Flatten(),
      Dense(None, kernel_init=Normal(0.01), multipliers=head),
    ),
    image_size=32,
    num_classes=10,
    source='cuda-convnet, example-layers/layers-18pct.cfg and layer-params-18pct.cfg',
    preprocessing=_CIFAR10,
  )


def _conv(features: int, kernel_size: int, stddev: float, bias: float = 0.0, **geometry) -> Conv:
  return Conv(
    features,
    kernel_size,
    kernel_init=Normal(stddev),
    bias_init=Constant(bias),
    multipliers=_BIAS_TWICE,
    **geometry,
  )


def _dense(features: int | None, bias: float = 0.0) -> Dense:
  return Dense(features, Normal(0.01), Constant(bias), _BIAS_TWICE)


def _hidden_layers() -> tuple[Layer, ...]:
  stage = (_dense(4096, bias=1.0), Activation(), Dropout())
  return stage + stage
