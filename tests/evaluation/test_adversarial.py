"""FGSM, PGD and `alexnet-flax evaluate --attack`; their images beside Foolbox's are in tests/parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet, cross_entropy, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation import adversarial
from alexnet_flax.evaluation.adversarial import Attack, fgsm, logits_of, pgd
from alexnet_flax.pretrained import PretrainedModel, unnamed
from tests.helpers import random_variables, smooth_image

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, (3, 4, 4, 3)).astype(np.float32)
LABELS = np.array([1, 4, 7], np.int32)
FIRST, SECOND = (RNG.normal(0, 0.3, shape).astype(np.float32) for shape in ((48, 20), (20, 10)))


def predict(images):
  """A network of two layers, which compiles at once."""
  return jnp.tanh(images.reshape(-1, 48) @ FIRST) @ SECOND


@jax.jit
def losses(images):
  return cross_entropy(predict(images), LABELS)


def lengths(change):
  return np.sqrt((np.float64(change) ** 2).sum((1, 2, 3)))


def test_fgsm_is_one_step_up_the_loss():
  gradient = np.asarray(jax.grad(lambda x: losses(x).sum())(IMAGES))
  one = fgsm(predict, IMAGES, LABELS, 0.25)
  np.testing.assert_allclose(one, np.clip(IMAGES + 0.25 * np.sign(gradient), 0, 1), atol=1e-6)
  assert np.all(losses(one) > losses(IMAGES))
  long = gradient / lengths(gradient).reshape(-1, 1, 1, 1)
  other = fgsm(predict, IMAGES, LABELS, 0.5, norm='l2')
  np.testing.assert_allclose(other, np.clip(IMAGES + 0.5 * long, 0, 1), atol=1e-6)


@pytest.mark.parametrize(('norm', 'epsilon'), [('linf', 0.15), ('l2', 0.7)])
def test_pgd_stays_in_the_ball_and_beats_fgsm(norm, epsilon):
  attack = jax.jit(lambda x, epsilon, key: pgd(predict, x, LABELS, epsilon, norm=norm, key=key))
  for bound in (0.0, epsilon):
    found = np.asarray(attack(IMAGES, bound, jax.random.key(0)))
    size = np.abs(found - IMAGES).max() if norm == 'linf' else lengths(found - IMAGES).max()
    assert size == pytest.approx(bound, abs=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1
  assert losses(found).sum() > losses(fgsm(predict, IMAGES, LABELS, epsilon, norm=norm)).sum()
  assert np.any(found != attack(IMAGES, epsilon, jax.random.key(1)))


def test_the_networks_own_preprocessing_is_inside():
  spec = VARIANTS['cifar10_full'].scaled(1 / 8)
  model, variables = AlexNet(spec), random_variables(spec)
  images = np.stack([smooth_image(32, 32, seed) for seed in range(2)])
  network = PretrainedModel('', model, variables, unnamed(10))
  found = logits_of(model, variables)(images / np.float32(255))
  np.testing.assert_allclose(found, network.logits(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_random_start_lies_in_the_ball(norm, monkeypatch):
  monkeypatch.setattr(adversarial, '_direction', lambda predict, x, labels, norm: jnp.zeros_like(x))
  images = np.full((400, 2, 2, 3), 0.5, np.float32)
  labels = np.zeros(400, np.int32)
  change = pgd(predict, images, labels, 0.1, norm=norm, steps=1, key=jax.random.key(0)) - images
  if norm == 'linf':
    assert np.std(change) == pytest.approx(0.1 / 3**0.5, rel=0.05)  # uniform in -0.1 ... 0.1
  else:
    assert np.mean(lengths(change)) == pytest.approx(0.1 * 12 / 13, rel=0.02)  # uniform in a ball of R^12
  assert np.abs(np.mean(change)) < 0.005


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('fgm', 'linf', 0.1), "unknown attack 'fgm'; did you mean 'fgsm'?"),
    (('pgd', 'l1', 0.1), "unknown norm 'l1'"),
    (
      ('pgd', 'linf', 8.0),
      r'epsilon \(=8\) is no bound for linf; the values of pixels are in 0 \.\.\. 1 here',
    ),
    (('pgd', 'l2', -1.0), r'epsilon \(=-1\) is no bound for l2'),
    (('pgd', 'l2', float('nan')), r'epsilon \(=nan\) is no bound'),
    (('pgd', 'l2', 1.0, 0), r'steps \(=0\) must be at least 1'),
  ],
)
def test_attacks_that_cannot_be(arguments, message):
  with pytest.raises(UsageError, match=message):
    Attack(*arguments)


def network(folder, variant='cifar10_small_alexnet', seed=0):
  """A narrow network of random weights, in a file."""
  small = VARIANTS[variant]
  spec = small.scaled(1 / 16, min(small.image_size, 67))
  return str(save_weights(folder / f'{seed}.safetensors', spec, random_variables(spec, 10, seed))[0])


def test_accuracy_by_epsilon(data_dir, tmp_path, capsys):
  path = tmp_path / 'a.json'
  command = ['evaluate', network(tmp_path), '--dataset', 'digits:test[:37]', '--data_dir', data_dir]
  assert main([*command, '--json', str(path)]) == 0
  clean = json.loads(path.read_text())
  attack = ['--attack', 'pgd', '--steps', '3', '--epsilons', '0,16/255,0.2']
  capsys.readouterr()
  assert (
    main([*command, *attack, '--batch_size', '16', '--json', str(path), '--figure', str(tmp_path / 'a.svg')])
    == 0
  )
  out, attacked = capsys.readouterr().out, json.loads(path.read_text())
  first, second, third = attacked['attacks']
  assert [one['epsilon'] for one in attacked['attacks']] == [0, 16 / 255, 0.2]
  assert [first[name] for name in ('method', 'norm', 'steps', 'images')] == ['pgd', 'linf', 3, 37]
  assert first['top1'] == clean['top1']
  assert first['loss']['value'] == pytest.approx(clean['loss']['value'], rel=1e-5)
  assert first['loss']['value'] + 0.01 < second['loss']['value'] < third['loss']['value']
  lines = out.splitlines()
  assert lines[2] == 'PGD of 3 steps from a random start, epsilon in linf of values in 0 ... 1'
  assert [line.split()[0] for line in lines[5:8]] == ['0/255', '16/255', '51/255']
  assert f'{100 * second["top1"]["value"]:.2f} %' in lines[6]
  assert 'PGD of 3 steps on digits:test[:37], 37 images' in (tmp_path / 'a.svg').read_text(encoding='utf-8')


def test_several_networks(data_dir, tmp_path, capsys):
  """The loss of their mean grows."""
  files = [network(tmp_path, 'cifar10_full', seed) for seed in range(2)]
  common = ['--dataset', 'digits:test[:8]', '--data_dir', data_dir, '--attack', 'fgsm', '--norm', 'l2']
  assert main(['evaluate', *files, *common, '--epsilons', '0,1', '--json', '-']) == 0
  plain, attacked = json.loads(capsys.readouterr().out)['attacks']
  assert attacked['loss']['value'] > plain['loss']['value'] + 0.001


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--epsilons=', '--norm, --epsilons and --steps are for --attack=fgsm or pgd'),
    ('--attack pgd --epsilons=', "--epsilons: '' is no number"),
    ('--epsilons 0', '--norm, --epsilons and --steps are for --attack=fgsm or pgd'),
    ('--attack fgsm --steps 3', '--steps is for --attack=pgd; fgsm is one step'),
    ('--attack pgd --epsilons 8/0', "--epsilons: '8/0' is no number; write them as in 0,1/255,0.03"),
    ('--attack pgd --epsilons 0,,1', "--epsilons: '' is no number"),
    ('--attack pgd --epsilons 8', 'epsilon (=8) is no bound for linf'),
    ('--attack pgd --steps 0', 'steps (=0) must be at least 1'),
    ('--attack pdg', "argument --attack: invalid choice: 'pdg'"),
    ('--attack pgd --protocol ten-crop', '--protocol=ten-crop: an attack is on one crop'),
    ('--attack pgd --calibrate halves', '--calibrate: adversarial images are not calibrated'),
    (
      '--attack pgd --dataset imagenet2012_corrupted',
      'imagenet2012_corrupted is many data sets: attack a part of it, such as imagenet2012_corrupted/fog_3',
    ),
  ],
)
def test_mistakes(tmp_path, data_dir, capsys, arguments, message):
  common = ['evaluate', network(tmp_path), '--dataset', 'digits:test[:8]', '--data_dir', data_dir]
  assert main([*common, *arguments.split()]) == 2
  out, errors = capsys.readouterr()
  assert message in errors
  assert (out, len(errors.splitlines())) == ('', 1)
