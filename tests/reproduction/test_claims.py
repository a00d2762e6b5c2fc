"""Claims are complete, their scores are computed as stated, and a verdict follows its rule."""

import json
import math

import pytest

from alexnet_flax.config import Config, build_spec, from_dict, idle_keys, to_dict, with_values
from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Conv, Dense, LocalResponseNorm
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.optim import OptimizerConfig
from alexnet_flax.reproduction.claims import CLAIMS, Point, changes, epochs_until
from alexnet_flax.reproduction.reproduce import verdict


def config_of(values):
  return from_dict(to_dict(with_values(Config(), values)))


@pytest.mark.parametrize('name', CLAIMS)
def test_configurations_are_valid(name):
  claim = CLAIMS[name]
  for arm in claim.arms:
    config = config_of(claim.values(arm, 3, {}))
    assert config.seed == 3
    assert not config.augment.is_on
    augmented = name in ('cifar10_alexnet', 'ablation', '13pct', '11pct') and arm != 'no augmentation'
    assert config.data.train_view.flip == augmented
  assert claim.source
  assert claim.departures


def test_the_programs_schedule():
  """A tenth of 0.001 after 8 of 10 epochs; weight decay of 0.004, for fully connected layers 0.03."""
  config = config_of(CLAIMS['80sec'].values('80sec', 0, {}))
  assert (config.data.batch_size, config.optimizer.momentum) == (128, OptimizerConfig.momentum) == (128, 0.9)
  rate = config.optimizer.rate_by_step(3910, 391)
  assert [float(rate(step)) for step in (0, 3127, 3129, 3909)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_an_unknown_name_gets_the_nearest():
  with pytest.raises(UsageError, match="did you mean 'figure1'"):
    CLAIMS['figur1']


def test_epochs_until_an_error_are_interpolated():
  curve = [Point(1, 0.5, 1), Point(2, 0.3, 1), Point(3, 0.2, 1)]
  assert epochs_until(curve, 0.25) == pytest.approx(2.5)
  assert epochs_until(curve, 0.5) == 1
  assert epochs_until(curve, 0.7) == pytest.approx(0.5)  # from an error of 0.9, a guess, at the start
  assert epochs_until(curve, 0.1) == math.inf


def runs_of(errors):
  return [{'arm': '80sec', 'seed': n, 'curve': [[9, 0.5, 0.9], [10, 0.2, e]]} for n, e in enumerate(errors)]


@pytest.mark.parametrize(
  ('errors', 'outcome'),
  [
    ([0.25, 0.25, 0.25], 'reproduced'),  # better
    ([0.25, 0.27, 0.29], 'reproduced'),  # 0.27 ± 0.0115: within two standard errors of 0.26
    ([0.275, 0.276, 0.277], 'missed'),
    ([0.268], 'reproduced'),  # one seed: ± 0.0044, of 10,000 images
    ([0.27], 'missed'),
  ],
)
def test_a_verdict_is_two_standard_errors_or_better(errors, outcome):
  found = verdict(CLAIMS['80sec'], runs_of(errors))
  assert found.outcome == outcome
  assert found.mean == pytest.approx(sum(errors) / len(errors))


def test_a_ratio_takes_the_arms_of_a_seed_and_higher_is_better():
  claim = CLAIMS['figure1']
  runs = [
    {'arm': arm, 'seed': seed, 'curve': [[epochs, 0.25, 0.4]]}
    for seed in range(2)
    for arm, epochs in (('relu', 4.0), ('tanh', 28.0 + seed))
  ]
  assert verdict(claim, runs).outcome == 'reproduced'
  assert verdict(claim, runs).mean == pytest.approx((7 + 7.25) / 2)
  assert verdict(claim, runs[:1]) is None  # no seed has both arms
  assert verdict(claim, runs[:3]).seeds == 1  # nor has the second
  assert verdict(claim, runs[:2]).outcome == 'undecided'  # one ratio has no error
  slow = [one | {'curve': [[8.0 + one['seed'], 0.25, 0.4]]} if one['arm'] == 'tanh' else one for one in runs]
  assert verdict(claim, slow).outcome == 'missed'
  never = [one | {'curve': [[60.0, 0.5, 0.6]]} if one['arm'] == 'tanh' else one for one in runs]
  assert verdict(claim, never).outcome == 'undecided'


def test_pytorch_classifications_recipe():
  """TRAINING.md: 164 epochs, a tenth of the rate after 81 and 122; cifar.py's transforms and weight decay."""
  config = config_of(CLAIMS['cifar10_alexnet'].values('cifar10_alexnet', 0, {}))
  rate = config.optimizer.rate_by_step(164 * 391, 391)
  rates = [float(rate(epoch * 391 + 5)) for epoch in (0, 80, 81, 121, 122, 163)]
  assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])
  view = config.data.train_view
  assert (view.crop, view.crop_padding, view.rotation_fill) == ('random_crop', 4, (0.0, 0.0, 0.0))
  best = [Point(1, 0.5, 0.4), Point(2, 0.1, 0.2), Point(3, 0.05, 0.3)]  # cifar.py's 'Best acc'
  assert CLAIMS['cifar10_alexnet'].score({'cifar10_alexnet': best}) == 0.2
  spec = VARIANTS['cifar10_alexnet']
  assert spec.preprocessing.mean == (0.4914, 0.4822, 0.4465)
  # torch.optim.SGD decays every parameter.
  assert {layer.multipliers.bias_decay for layer in spec.layers if isinstance(layer, Conv | Dense)} == {1.0}


@pytest.mark.parametrize(
  ('name', 'drops', 'decays', 'norms'),
  [
    ('13pct', (140, 150, 160), [0, 0, 1, 1, 1], []),
    ('11pct', (500, 510, 520), [0, 0, 1, 1, 2.5], [(9, 1.0, 0.001 / 9)] * 2),
  ],
)
def test_section_3_3(name, drops, decays, norms):
  """layer-params-conv-local-*pct.cfg and the program's page Methodology; ten crops of 24 of 32 pixels."""
  config = config_of(CLAIMS[name].values(name, 0, {}))
  rate = config.optimizer.rate_by_step(drops[2] * 391, 391)
  assert [float(rate(epoch * 391 + 5)) for epoch in (drops[0] - 1, *drops[:2])] == pytest.approx(
    [1e-3, 1e-4, 1e-5]
  )
  assert (config.total_epochs, config.optimizer.weight_decay) == (drops[2], 0.004)
  assert (config.data.train_view.crop, config.data.eval_view.ten_crop) == ('random_crop', True)
  spec = build_spec(config)
  assert (spec.image_size, spec.preprocessing.center_crop_share) == (24, 24 / 32)
  assert [(x.size, x.k, x.alpha) for x in spec.layers if isinstance(x, LocalResponseNorm)] == norms
  weights = [layer.multipliers for layer in spec.layers if isinstance(layer, Conv | Dense)]
  assert [one.kernel_decay for one in weights] == decays
  assert {(one.bias_rate, one.bias_decay) for one in weights} == {(2.0, 0.0)}


def test_random_and_true_labels():
  """Zhang et al. 2017: 0.01, times 0.95 each epoch, no regularisation; centre crops of 28 pixels."""
  claims = CLAIMS['random_labels'], CLAIMS['true_labels']
  configs = {arm: config_of(claim.values(arm, 0, {})) for claim in claims for arm in claim.arms}
  assert {arm: config.data.corruption for arm, config in configs.items()} == {
    'random labels': 'random_labels',
    'shuffled pixels': 'shuffled_pixels',
    'true labels': 'none',
  }
  config = configs['random labels']
  rate = config.optimizer.rate_by_step(60 * 391, 391)
  assert [float(rate(epoch * 391 + 5)) for epoch in (0, 1, 20)] == pytest.approx(
    [0.01, 0.0095, 0.01 * 0.95**20]
  )
  assert config.optimizer.weight_decay == 0
  curves = {
    'random labels': [Point(1, 0.9, 0.9), Point(60, 0.002, 0.9)],
    'shuffled pixels': [Point(1, 0.5, 0.4)],
  }
  assert claims[0].score(curves) == 0.002
  assert claims[1].score({'true labels': [Point(1, 0.5, 0.4), Point(20, 0.001, 0.24)]}) == 0.24


def test_changes_and_their_order():
  claim = CLAIMS['ablation']
  assert claim.published_changes.keys() <= claim.arms.keys()
  gains = {arm: claim.published_changes.get(arm, 0.0) for arm in claim.arms}

  def curves(sign):
    return {arm: [Point(6, 0.5, 0.5 - sign * gains[arm] / 100)] for arm in claim.arms}

  assert changes(curves(1))['BatchNorm after'] == pytest.approx(0.022)
  assert claim.score(curves(1)) == pytest.approx(1)
  assert claim.score(curves(-1)) == pytest.approx(-1)
  records = [
    {'arm': arm, 'seed': seed, 'curve': [list(point) for point in curve]}
    for seed, sign in enumerate((1, 1, 1))
    for arm, curve in sorted(curves(sign).items())  # as files of results have them
  ]
  assert verdict(claim, records).mean == pytest.approx(1)
  assert verdict(claim, records).outcome == 'reproduced'
  assert verdict(claim, records[: len(claim.arms)]).outcome == 'undecided'
  flipped = [one | {'curve': [list(point) for point in curves(-1)[one['arm']]]} for one in records]
  mixed = [two if one['seed'] else one for one, two in zip(records, flipped, strict=True)]
  assert verdict(claim, mixed).outcome == 'missed'
  # An order of its own, the same in each seed, which agrees a little.
  order = [4, 7, 3, 1, 9, 0, 2, 6, 10, 5, 8]
  weak = dict(zip(claim.published_changes, order, strict=True))
  records = [one | {'curve': [[6, 0.5, 0.5 - weak.get(one['arm'], 0) / 100]]} for one in records]
  assert 0 < verdict(claim, records).mean < 0.52
  assert verdict(claim, records).outcome == 'missed'


def test_the_arms_of_the_ablation_are_different_networks():
  claim = CLAIMS['ablation']
  configs = {arm: config_of(claim.values(arm, 0, {})) for arm in claim.arms}
  assert len({json.dumps(to_dict(config)) for config in configs.values()}) == len(configs)
  assert not any(idle_keys(config) for config in configs.values())
