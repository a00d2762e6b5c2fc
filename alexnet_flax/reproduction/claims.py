"""Published results as data: what was claimed, by which recipe, and how to measure it.

A recipe is a configuration: the keys that all arms share, and those in which each arm differs. A score is a
number of one seed, computed from the curves of its arms. `CLAIMS` holds those that can be run here.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from scipy import stats

from alexnet_flax.errors import unknown_name


class Point(NamedTuple):
  """Errors in [0, 1] after an epoch: of its training steps, as they were made, and of the test set."""

  epoch: float
  train_error: float
  test_error: float


Curve = Sequence[Point]
Keys = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A published result.

  Attributes:
    name: What `alexnet-flax reproduce` calls it.
    what: What was measured, for the ledger.
    published: The published number, in the unit of the scores.
    unit: 'test error' or 'training error' (shares of 1), 'times', or 'rank correlation'.
    source: Where it was published.
    keys: The configuration that all arms share.
    arms: By name, the keys in which each arm differs.
    score: Returns the score of a seed from the curves by arm.
    lower_is_better: Whether a lower score is a better one.
    seeds: The number of seeds by default.
    minutes: What a seed took, on one or two cores of a CPU.
    until: The training error at which a run may stop; None for the recipe's end.
    rates: The learning rates from which each arm has the one with the fewest epochs to `until`, by the first
      seed; none if the recipe states its own.
    published_changes: By arm, how many points more of accuracy than the first arm were published for it; the
      score is the rank correlation with these.
    departures: Where this differs from what was published.
  """

  name: str
  what: str
  published: float
  unit: Literal['test error', 'training error', 'times', 'rank correlation']
  source: str
  keys: Keys
  arms: Mapping[str, Keys]
  score: Callable[[Mapping[str, Curve]], float]
  lower_is_better: bool = True
  seeds: int = 3
  minutes: float | None = None
  until: float | None = None
  rates: tuple[float, ...] = ()
  published_changes: Mapping[str, float] = dataclasses.field(default_factory=dict)
  departures: str = ''

  def values(self, arm: str, seed: int, others: Mapping[str, Any]) -> Keys:
    """Returns the keys of a run that are stated, by the recipe or by `others`."""
    return {**self.keys, **self.arms[arm], **others, 'seed': seed}


def final_test_error(curves: Mapping[str, Curve]) -> float:
  """Returns the test error after the last epoch of the only arm."""
  (curve,) = curves.values()
  return curve[-1].test_error


def best_test_error(curves: Mapping[str, Curve]) -> float:
  """Returns the least test error after any epoch of the only arm."""
  (curve,) = curves.values()
  return min(point.test_error for point in curve)


def epochs_until(curve: Curve, train_error: float) -> float:
  """Returns the epochs until the training error fell to a value, interpolated; infinite if it never did.

  >>> epochs_until([Point(1, 0.4, 0.5), Point(2, 0.2, 0.4)], 0.25)
  1.75
  """
  before = Point(0.0, _CHANCE, _CHANCE)
  for point in curve:
    if point.train_error <= train_error:
      share = (before.train_error - train_error) / (before.train_error - point.train_error)
      return before.epoch + share * (point.epoch - before.epoch)
    before = point
  return math.inf


def _tanh_to_relu(curves: Mapping[str, Curve]) -> float:
  return epochs_until(curves['tanh'], _FIGURE_1) / epochs_until(curves['relu'], _FIGURE_1)


def _random_labels_error(curves: Mapping[str, Curve]) -> float:
  return curves['random labels'][-1].train_error


def changes(curves: Mapping[str, Curve]) -> dict[str, float]:
  """Returns how much less test error than the first arm each other arm has at its end."""
  (_, first), *others = curves.items()
  return {arm: first[-1].test_error - curve[-1].test_error for arm, curve in others}


def _rank_correlation(curves: Mapping[str, Curve]) -> float:
  found = changes(curves)
  return float(stats.spearmanr([found[arm] for arm in _ON_IMAGENET], list(_ON_IMAGENET.values())).statistic)


_CHANCE = 0.9  # the error of a guess among ten classes
_FIGURE_1 = 0.25
_EPOCH = 391  # steps of 128 images
_CIFAR10: Keys = {
  'data.dataset': 'cifar10',
  'data.batch_size': 128,
  'data.eval_batch_size': 1000,
  'log_every_steps': _EPOCH,
  'report': False,
}
_WHOLE_IMAGE: Keys = {
  **_CIFAR10,
  'data.crop_scale': (1.0, 1.0),
  'data.crop_ratio': (1.0, 1.0),
  'data.flip': False,
}
_KRIZHEVSKY: Keys = {  # of all his networks for CIFAR-10
  'optimizer.learning_rate': 0.001,
  'optimizer.schedule': 'step',
  'optimizer.weight_decay': 0.004,
}
_CUDA_CONVNET: Keys = {**_WHOLE_IMAGE, **_KRIZHEVSKY}
_SECTION_3_3: Keys = {**_CIFAR10, **_KRIZHEVSKY, 'data.crop': 'random_crop', 'data.ten_crop': True}
_JPEG = 'the images went through JPEG once'
_MEAN = f'the mean of each channel is subtracted, not the mean image; {_JPEG}'
_ALL_AT_ONCE = (
  f'{_MEAN}; the program trains on four fifths of the images until their error no longer falls, then on all,'
  ' here on all from the start; it lowers the rate of the weights alone, here that of the biases too'
)

_ZHANG = 'Zhang et al. 2017 (arXiv:1611.03530), table 1'
_SMALL_ALEXNET: Keys = {
  **_CIFAR10,
  'model.variant': 'cifar10_small_alexnet',
  'data.crop': 'center_crop',
  'data.flip': False,
  'optimizer.learning_rate': 0.01,
  'optimizer.schedule': 'step',
  'optimizer.boundary_epochs': tuple(float(epoch) for epoch in range(1, 60)),
  'optimizer.decay_factor': 0.95,
  'optimizer.weight_decay': 0.0,
  'total_epochs': 60.0,
}
_NOT_PUBLISHED = (
  "batch size, epochs, initialisation and LRN's constants are not published; images are standardised by the"
  " set's mean and deviation, not each by its own; the training error is the mean over the last epoch, after"
  f' which a run stops if it is at most 0.1 %; {_JPEG}'
)

_AFTER = {'model.batch_norm': 'after'}
# caffenet-benchmark's accuracies (top-1 at 128 pixels) less its baseline's, 47.1 %.
_ON_IMAGENET = {
  'tanh': -7.0,
  'average pools': -3.6,
  'LRN': 0.0,
  'BatchNorm before': 0.7,
  'max + average pools': 1.2,
  'ELU': 1.7,
  'padded pools': 1.7,
  'linear decay': 2.2,
  'BatchNorm after': 2.2,
  'BatchNorm after, no dropout': 4.2,
  'BatchNorm after, dropout 0.2': 5.6,
}

_ALL = (
  Claim(
    name='80sec',
    what="cuda-convnet's 80-second network on CIFAR-10, no augmentation",
    published=0.26,
    unit='test error',
    source='dnouri/cuda-convnet, example-layers/layers-80sec.cfg and layer-params-80sec.cfg',
    keys=_CUDA_CONVNET
    | {'model.variant': 'cifar10_80sec', 'optimizer.boundary_epochs': (8.0,), 'total_epochs': 10.0},
    arms={'80sec': {}},
    score=final_test_error,
    minutes=24,
    departures=f"{_MEAN}; the files say 'after 8 epochs' a tenth of the rate, and not when to stop: after 10",
  ),
  Claim(
    name='18pct',
    what="cuda-convnet's 18 % network on CIFAR-10, no augmentation",
    published=0.18,
    unit='test error',
    source='dnouri/cuda-convnet, example-layers/layers-18pct.cfg and layer-params-18pct.cfg',
    keys=_CUDA_CONVNET
    | {
      'model.variant': 'cifar10_full',
      'optimizer.boundary_epochs': (120.0, 130.0),
      'total_epochs': 140.0,
      'eval_every_epochs': 10.0,
    },
    arms={'18pct': {}},
    score=final_test_error,
    seeds=1,
    minutes=125,
    departures=f'{_MEAN}; the files do not say when to stop: 10 epochs after the second drop',
  ),
  Claim(
    name='13pct',
    what='the four-layer network of section 3.3 on CIFAR-10, without LRN, ten crops',
    published=0.13,
    unit='test error',
    source=(
      'Krizhevsky et al. 2012, section 3.3; dnouri/cuda-convnet, layers-conv-local-13pct.cfg and'
      " layer-params-conv-local-13pct.cfg in example-layers/; the program's page 'Methodology'"
    ),
    keys=_SECTION_3_3
    | {
      'model.variant': 'cifar10_local',
      'optimizer.boundary_epochs': (140.0, 150.0),
      'total_epochs': 160.0,
      'eval_every_epochs': 16.0,  # ten crops take long
    },
    arms={'13pct': {}},
    score=final_test_error,
    seeds=1,
    departures=_ALL_AT_ONCE,
  ),
  Claim(
    name='11pct',
    what='the four-layer network of section 3.3 on CIFAR-10, with LRN, ten crops',
    published=0.11,
    unit='test error',
    source='Krizhevsky et al. 2012, 3.3; dnouri/cuda-convnet, example-layers/layer*-conv-local-11pct.cfg',
    keys=_SECTION_3_3
    | {
      'model.variant': 'cifar10_local_lrn',
      'optimizer.boundary_epochs': (500.0, 510.0),
      'total_epochs': 520.0,
      'eval_every_epochs': 52.0,
    },
    arms={'11pct': {}},
    score=final_test_error,
    seeds=1,
    departures=_ALL_AT_ONCE,
  ),
  Claim(
    name='figure1',
    what='epochs to 25 % training error on CIFAR-10, tanh to ReLU, four convolutions, no regularisation',
    published=6.0,
    unit='times',
    source='Krizhevsky, Sutskever, Hinton 2012, section 3.1 and figure 1',
    keys=_WHOLE_IMAGE
    | {
      'model.variant': 'cifar10_four_convs',
      'optimizer.schedule': 'constant',
      'optimizer.weight_decay': 0.0,
      'total_epochs': 60.0,
    },
    arms={'relu': {'model.activation': 'relu'}, 'tanh': {'model.activation': 'tanh'}},
    score=_tanh_to_relu,
    lower_is_better=False,
    minutes=44,
    until=_FIGURE_1,
    rates=(0.003, 0.01, 0.001, 0.03),
    departures=(
      'the network is ours, for the paper states none; the training error is the mean over an epoch,'
      f' put at its end; {_MEAN}'
    ),
  ),
  Claim(
    name='cifar10_alexnet',
    what="pytorch-classification's AlexNet on CIFAR-10, padded crops and flips, the best of 164 epochs",
    published=0.2278,
    unit='test error',
    source='bearpaw/pytorch-classification, README.md, TRAINING.md and models/cifar/alexnet.py',
    keys=_CIFAR10
    | {
      'model.variant': 'cifar10_alexnet',
      'data.crop': 'random_crop',
      'data.crop_padding': 4,
      'optimizer.learning_rate': 0.01,
      'optimizer.schedule': 'step',
      'optimizer.boundary_epochs': (81.0, 122.0),
      'optimizer.weight_decay': 5e-4,
      'total_epochs': 164.0,
    },
    arms={'cifar10_alexnet': {}},
    score=best_test_error,
    seeds=1,
    minutes=150,
    departures=(
      'the least error of all epochs is compared, for cifar.py ends by printing that, not the last; the rate'
      " is that of the model's file (0.01 without BatchNorm); the command does not state one, and its default"
      f' is 0.1; {_JPEG}'
    ),
  ),
  Claim(
    name='random_labels',
    what='training error of the small AlexNet on CIFAR-10 with random labels',
    published=0.0018,
    unit='training error',
    source=f'{_ZHANG}: 99.82 % are fitted; section 2 and appendix A',
    keys=_SMALL_ALEXNET,
    arms={
      'random labels': {'data.corruption': 'random_labels'},
      'shuffled pixels': {'data.corruption': 'shuffled_pixels'},
    },
    score=_random_labels_error,
    seeds=1,
    minutes=128,
    until=0.001,
    departures=_NOT_PUBLISHED,
  ),
  Claim(
    name='true_labels',
    what='test error of the small AlexNet on CIFAR-10 with true labels, no augmentation, no weight decay',
    published=0.2393,
    unit='test error',
    source=f'{_ZHANG}: 76.07 % are right',
    keys=_SMALL_ALEXNET,
    arms={'true labels': {}},
    score=final_test_error,
    seeds=1,
    minutes=55,
    until=0.001,
    departures=_NOT_PUBLISHED,
  ),
  Claim(
    name='ablation',
    what='changes of an AlexNet on CIFAR-10 in the order of the same changes on ImageNet',
    published=0.0,
    unit='rank correlation',
    source='Mishkin, Sergievskiy, Matas 2017 (arXiv:1606.02228); ducha-aiki/caffenet-benchmark, one run each',
    keys=_CIFAR10
    | {
      'model.variant': 'ungrouped',
      'model.width': 0.125,
      'model.image_size': 63,
      'data.crop': 'random_crop',
      'optimizer.learning_rate': 0.01,
      'optimizer.schedule': 'step',
      'optimizer.boundary_epochs': (4.0, 5.0),
      'optimizer.weight_decay': 5e-4,
      'total_epochs': 6.0,
    },
    arms={
      'base': {'model.lrn': False},
      'LRN': {},
      'BatchNorm before': {'model.lrn': False, 'model.batch_norm': 'before'},
      'BatchNorm after': {'model.lrn': False, **_AFTER},
      'BatchNorm after, dropout 0.2': {'model.lrn': False, **_AFTER, 'model.dropout_rate': 0.2},
      'BatchNorm after, no dropout': {'model.lrn': False, **_AFTER, 'model.dropout_rate': 0.0},
      'dropout 0.2': {'model.lrn': False, 'model.dropout_rate': 0.2},
      'no dropout': {'model.lrn': False, 'model.dropout_rate': 0.0},
      'ELU': {'model.lrn': False, 'model.activation': 'elu'},
      'tanh': {'model.lrn': False, 'model.activation': 'tanh'},
      'pools of 2x2': {'model.lrn': False, 'model.pool_size': 2},
      'average pools': {'model.lrn': False, 'model.pooling': 'avg'},
      'max + average pools': {'model.lrn': False, 'model.pooling': 'max+avg'},
      'padded pools': {'model.lrn': False, 'model.pool_padding': 1},
      'no augmentation': {'model.lrn': False, 'data.crop': 'center_crop', 'data.flip': False},
      'no weight decay': {'model.lrn': False, 'optimizer.weight_decay': 0.0},
      'linear decay': {
        'model.lrn': False,
        'optimizer.schedule': 'polynomial',
        'optimizer.boundary_epochs': (),
      },
    },
    score=_rank_correlation,
    lower_is_better=False,
    minutes=64,
    published_changes=_ON_IMAGENET,
    departures=(
      'a network of an eighth of the channels, images of 63 pixels, enlarged from 32; six epochs, a tenth of'
      ' the rate after four and five; the base: dropout 0.5, overlapping max pools, crops, flips, no norms;'
      f' the published BatchNorm with dropout 0.2 and none has no scale and bias, ours has; {_JPEG}'
    ),
  ),
)


class _Claims(dict[str, Claim]):
  def __missing__(self, name: str) -> Claim:
    raise unknown_name('published result', name, self)


CLAIMS: Mapping[str, Claim] = types.MappingProxyType(_Claims((claim.name, claim) for claim in _ALL))
