"""The step: devices, micro-batches, weights, averages, metrics, and lowering for other machines."""

import dataclasses
import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_flax import (
  VARIANTS,
  AlexNet,
  create_train_state,
  cross_entropy,
  eval_step,
  mean_squared_error,
  sgd,
  train_step,
)
from alexnet_flax.data.augment import Augmentation, augment, normalize
from alexnet_flax.metrics import Metrics, measure
from alexnet_flax.models.spec import Dropout, Pool, Preprocessing
from alexnet_flax.models.surgery import with_head_on
from alexnet_flax.optim import freeze
from alexnet_flax.steps import TrainState, guarded

SHAPE = (67, 67, 3)
KEY = jax.random.key(7)


def network(name, **options):
  """The first two stages, with all kinds of layers and without dropout."""
  return AlexNet(with_head_on(VARIANTS[name].scaled(1 / 16, 67), 'pool2'), num_classes=10, **options)


@functools.cache
def initial(model, **options):
  tx = sgd(0.01, spec=model.spec, weight_decay=5e-4)
  return jax.jit(lambda key: create_train_state(model, tx, key, SHAPE, **options))(jax.random.key(0))


def batches(count=3, size=32):
  rng = np.random.default_rng(0)
  for _ in range(count):
    yield {
      'image': rng.normal(size=(size, *SHAPE)).astype(np.float32),
      'label': rng.integers(0, 10, size).astype(np.int32),
      'weight': np.ones(size, np.float32),
    }


def run(step, state, place=lambda batch: batch, key=KEY):
  for batch in batches():
    state, metrics = step(state, place(batch), key)
  return state, metrics


def greatest_error(state, reference):
  def error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-30))

  ours, theirs = ((s.params, s.batch_stats) for s in (state, reference))
  return max(jax.tree.leaves(jax.tree.map(error, ours, theirs)))


# As users compile: rounding then differs inside of fusions, where a derivative once got lost (`layers.py`).
AS_USERS = {'xla_backend_optimization_level': 3}
if importlib.metadata.version('jaxlib') < '0.11':  # as in conftest.py
  AS_USERS['xla_cpu_use_fusion_emitters'] = True


def mesh(name='data', kind=AxisType.Auto):
  return jax.make_mesh((8,), (name,), axis_types=(kind,))


@pytest.mark.parametrize(
  ('name', 'accumulate_steps', 'tolerance'),
  # Moments of half the batch amplify rounding more.
  [('batchnorm', 2, 2e-4), ('paper', 1, 2e-5)],
)
def test_one_device_eight_by_jit_by_pmap_and_by_shard_map_agree(name, accumulate_steps, tolerance):
  step = functools.partial(train_step, accumulate_steps=accumulate_steps)
  mapped = functools.partial(step, axis_name='batch')
  model, mapped_model = network(name), network(name, axis_name='batch')
  one, metrics = run(jax.jit(step), initial(model))
  assert one.step == 3

  replicated, split = NamedSharding(mesh(), P()), NamedSharding(mesh(), P('data'))
  state = jax.device_put(initial(model), replicated)
  eight, eight_metrics = run(
    jax.jit(step, compiler_options=AS_USERS),
    state,
    lambda batch: jax.device_put(batch, split),
    jax.device_put(KEY, replicated),
  )

  pmapped, pmapped_metrics = run(
    jax.pmap(mapped, axis_name='batch', donate_argnums=0),
    jax_utils.replicate(initial(mapped_model)),
    lambda batch: jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), batch),
    jax_utils.replicate(KEY),
  )
  shard_map = jax.shard_map(mapped, mesh=mesh('batch'), in_specs=(P(), P('batch'), P()), out_specs=P())
  sharded, sharded_metrics = run(jax.jit(shard_map), initial(mapped_model))

  others = [
    (eight, eight_metrics),
    jax_utils.unreplicate((pmapped, pmapped_metrics)),
    (sharded, sharded_metrics),
  ]
  for other, other_metrics in others:
    assert greatest_error(other, one) <= tolerance
    np.testing.assert_allclose(other_metrics['loss'], metrics['loss'], rtol=1e-5)
    assert other_metrics.images == 32


@pytest.mark.parametrize('pooling', ['max', 'max+avg'])
def test_both_kinds_of_mesh_axes_give_the_same(pooling):
  """Explicit ones, JAX's default, refuse a dropout's mask that is placed otherwise."""
  spec = with_head_on(VARIANTS['paper'].scaled(1 / 16, 67), 'pool1').replace(Pool, kind=pooling)
  spec = dataclasses.replace(spec, layers=(*spec.layers[:-1], Dropout(), spec.layers[-1]))
  mapped = functools.partial(train_step, axis_name='data')
  found = {}
  for kind in (AxisType.Auto, AxisType.Explicit):
    axes = mesh(kind=kind)
    replicated, split = NamedSharding(axes, P()), NamedSharding(axes, P('data'))
    batch, key = jax.device_put(next(batches(size=16)), split), jax.device_put(KEY, replicated)
    shard_map = jax.shard_map(mapped, mesh=axes, in_specs=(P(), P('data'), P()), out_specs=P())
    found[kind] = [
      jax.jit(step)(jax.device_put(initial(AlexNet(spec, 10, axis_name=name)), replicated), batch, key)[0]
      for step, name in ((train_step, None), (shard_map, 'data'))
    ]
  for ours, reference in zip(*found.values(), strict=True):
    assert greatest_error(ours, reference) <= 1e-6


def test_augmentation_on_a_mesh_with_explicit_axes():
  """Mixing needs each image's neighbour, which may be on another device."""
  axes = mesh(kind=AxisType.Explicit)
  split = NamedSharding(axes, P('data'))
  options = Augmentation(0.1, 0.1, 0.1, 0.1, 0.1, erasing=0.5, mixup=0.2, cutmix=0.5)
  out = jax.eval_shape(
    functools.partial(augment, preprocessing=Preprocessing(), augmentation=options, num_classes=10),
    {
      'image': jax.ShapeDtypeStruct((16, *SHAPE), jnp.uint8, sharding=split),
      'label': jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split),
    },
    jax.ShapeDtypeStruct((), KEY.dtype, sharding=NamedSharding(axes, P())),
  )
  assert [x.sharding.spec for x in out.values()] == [P('data', None, None, None), P('data', None)]


def test_accumulation_is_the_mean_gradient_and_one_step():
  model = network('paper')  # without BatchNorm, micro-batches change nothing
  whole, metrics = run(jax.jit(train_step), initial(model))
  parts, part_metrics = run(jax.jit(functools.partial(train_step, accumulate_steps=4)), initial(model))
  assert parts.step == 3
  assert greatest_error(parts, whole) <= 1e-5
  np.testing.assert_allclose(part_metrics['loss'], metrics['loss'], rtol=1e-6)


def test_accumulation_normalises_each_part_by_its_own_moments():
  model, batch = network('batchnorm'), next(batches())
  step = functools.partial(train_step, accumulate_steps=2)
  state, _ = jax.jit(step)(initial(model), batch, KEY)
  stats = initial(model).batch_stats
  for part in (slice(0, None, 2), slice(1, None, 2)):
    variables = {'params': initial(model).params, 'batch_stats': stats}
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))
    _, mutated = apply(variables, batch['image'][part])
    stats = mutated['batch_stats']
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.batch_stats, stats)


def test_accumulation_that_does_not_divide_the_batch():
  with pytest.raises(ValueError, match=r'batch \(of 32\) must be divisible by accumulate_steps \(=3\)'):
    train_step(initial(network('paper')), next(batches()), KEY, accumulate_steps=3)


def test_examples_of_weight_zero_change_nothing():
  model, batch = network('paper'), next(batches())
  padded = {name: np.concatenate([x, x[:4]]) for name, x in batch.items()}
  padded['weight'][32:] = 0
  padded['image'][32:] = 1e6
  ours, metrics = jax.jit(train_step)(initial(model), padded, KEY)
  reference, reference_metrics = jax.jit(train_step)(initial(model), batch, KEY)
  assert greatest_error(ours, reference) <= 1e-5
  assert metrics.images == 32
  np.testing.assert_allclose(metrics['loss'], reference_metrics['loss'], rtol=1e-6)


def test_a_batch_without_weight_leaves_everything_finite():
  batch = next(batches()) | {'weight': np.zeros(32, np.float32)}
  state, metrics = jax.jit(train_step)(initial(network('paper')), batch, KEY)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  assert np.isnan(metrics.means()['loss'])


def test_dropout_differs_by_step_by_micro_batch_and_by_device():
  spec = with_head_on(VARIANTS['paper'].scaled(1 / 16, 67), 'pool1')
  spec = dataclasses.replace(spec, layers=(*spec.layers[:-1], Dropout(), spec.layers[-1]))
  model = AlexNet(spec, 10, axis_name='batch')
  seen = []

  def loss(logits, labels):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits)
    return cross_entropy(logits, labels)

  image = np.random.default_rng(0).normal(size=(1, 1, *SHAPE)) * 60
  batch = {
    'image': np.broadcast_to(image, (8, 2, *SHAPE)).astype(np.float32),
    'label': np.zeros((8, 2), np.int32),
    'weight': np.ones((8, 2), np.float32),
  }
  step = functools.partial(train_step, loss=loss, axis_name='batch', accumulate_steps=2)
  state = jax_utils.replicate(
    create_train_state(model, sgd(0.0), jax.random.key(0), SHAPE)  # a rate of 0: weights stay
  )
  for _ in range(2):
    state, metrics = jax.pmap(step, axis_name='batch')(state, batch, jax_utils.replicate(KEY))
    jax.block_until_ready(metrics)
  jax.effects_barrier()
  rows = np.concatenate(seen)
  assert rows.shape == (2 * 8 * 2, 10)
  assert len(np.unique(rows, axis=0)) == len(rows)


def test_moving_average():
  model = network('batchnorm')
  state, step = initial(model, ema_decay=0.9), jax.jit(train_step)
  expected = {'params': state.params, 'batch_stats': state.batch_stats}
  for number, batch in enumerate(batches()):
    state, _ = step(state, batch, KEY)
    decay = min(0.9, (1 + number) / (10 + number))
    new = {'params': state.params, 'batch_stats': state.batch_stats}
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, new)  # noqa: B023
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.ema, expected)
  batch = next(batches())
  logits = jax.jit(functools.partial(model.apply, train=False))(state.ema, batch['image'])
  reference = cross_entropy(logits, jnp.asarray(batch['label'])).mean()
  np.testing.assert_allclose(jax.jit(eval_step)(state, batch)['loss'], reference, rtol=1e-5)


@pytest.mark.parametrize('decay', [-0.1, 1.0])
def test_moving_average_of_impossible_decay(decay):
  with pytest.raises(ValueError, match='ema_decay'):
    initial(network('paper'), ema_decay=decay)


def test_donation_is_possible():
  step = jax.jit(train_step, donate_argnums=0)
  state = jax.tree.map(jnp.copy, initial(network('batchnorm'), ema_decay=0.9))
  old = jax.tree.leaves(state.params)[0]
  state, _ = step(state, next(batches()), KEY)
  assert old.is_deleted()


def test_one_cpu_updates_kernels_in_place(monkeypatch):
  """XLA copied them before the step; the results are the same."""
  model, batch = network('paper'), next(batches())
  compiled = []
  for devices in (8, 1):
    monkeypatch.setattr(jax, 'device_count', lambda devices=devices: devices)
    step = jax.jit(lambda *arguments: train_step(*arguments), donate_argnums=0)
    compiled.append(step.lower(initial(model), batch, KEY).compile())
  copied, updated = (len(re.findall(r' = f32\[\d+,\S* copy\(', c.as_text())) for c in compiled)
  assert updated < copied
  results = [c(jax.tree.map(jnp.copy, initial(model)), batch, KEY)[0] for c in compiled]
  assert greatest_error(*results) <= 1e-6


def test_metrics_are_counted_by_hand():
  logits = jnp.array([[9, 8, 7, 6, 5, 4.0], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [0] * 6])
  state = create_train_state(network('paper'), sgd(0.1), KEY, SHAPE)
  state = state.replace(apply_fn=lambda variables, images, train: images)
  batch = {'image': logits, 'label': jnp.array([0, 4, 5, 5]), 'weight': jnp.array([1.0, 1, 1, 1])}
  metrics = eval_step(state, batch)
  # A row of equal logits is a miss for the last class: a collapsed network must not score.
  assert metrics.means() == pytest.approx(
    {'loss': float(cross_entropy(logits, batch['label']).mean()), 'top1': 1 / 4, 'top5': 2 / 4}
  )
  padded = eval_step(state, batch | {'weight': jnp.array([1.0, 0, 0, 0])})
  assert (padded['top1'], padded.images) == (1, 1)


def test_losses_by_hand():
  logits, label = jnp.log(jnp.array([[0.7, 0.2, 0.1]])), jnp.array([1])
  np.testing.assert_allclose(cross_entropy(logits, label), -np.log([0.2]), rtol=1e-6)
  smooth = -np.sum([0.1, 0.8, 0.1] * np.log([0.7, 0.2, 0.1]))
  np.testing.assert_allclose(cross_entropy(logits, label, label_smoothing=0.3), smooth, rtol=1e-5)
  squares = (0.7**2 + 0.8**2 + 0.1**2) / 3
  np.testing.assert_allclose(mean_squared_error(logits, label), squares, rtol=1e-5)
  mixed = jnp.array([[0.5, 0.5, 0.0]])
  np.testing.assert_allclose(cross_entropy(logits, mixed), -0.5 * np.log(0.14), rtol=1e-5)
  for wrong in (jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros((2,), jnp.int32)):
    with pytest.raises(ValueError, match='labels'):
      cross_entropy(logits, wrong)


def test_normalize():
  images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
  out = normalize({'image': jnp.asarray(images), 'label': 1}, preprocessing=Preprocessing())
  expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(out['image'], expected, rtol=1e-5, atol=1e-6)
  assert out['label'] == 1
  bgr = Preprocessing(1.0, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), 'BGR')
  out = normalize({'image': jnp.asarray(images)}, preprocessing=bgr)
  np.testing.assert_allclose(out['image'], images[..., ::-1] - np.array([1.0, 2, 3]), rtol=1e-6)
  with pytest.raises(TypeError, match='must be uint8'):
    normalize({'image': jnp.zeros((1, 2, 2, 3))}, preprocessing=bgr)


@pytest.mark.parametrize(
  ('name', 'dtype'),
  # In bfloat16 those that have all kinds of layers between them.
  [(name, jnp.float32) for name in VARIANTS]
  + [(name, jnp.bfloat16) for name in ('batchnorm', 'original_code', 'cifar10_full')],
)
def test_lowers_for_cuda_and_tpu(name, dtype):
  """Full size, with dropout, uint8 input and eight devices, on a machine that has neither."""
  spec = VARIANTS[name]
  model = AlexNet(spec, dtype=dtype)
  size = spec.image_size
  tx = sgd(0.01, spec=spec, weight_decay=5e-4)
  with jax.numpy_dtype_promotion('standard'):  # nn.BatchNorm mixes its two types
    state = jax.eval_shape(lambda: create_train_state(model, tx, KEY, (size, size, 3)))
  axes = mesh(kind=AxisType.Explicit)  # stricter than the other kind
  replicated, split = NamedSharding(axes, P()), NamedSharding(axes, P('data'))
  state, key = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    (state, jax.eval_shape(lambda: KEY)),
  )
  batch = {
    'image': jax.ShapeDtypeStruct((16, size, size, 3), jnp.uint8, sharding=split),
    'label': jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split),
    'weight': jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split),
  }
  preprocess = functools.partial(normalize, preprocessing=spec.preprocessing)
  step = jax.jit(functools.partial(train_step, preprocess=preprocess))
  with jax.numpy_dtype_promotion('standard'):
    export = jax.export.export(step, platforms=['cuda', 'tpu'])
    exported = export(state, batch, key)
  assert exported.platforms == ('cuda', 'tpu')
  assert exported.nr_devices == 8


def test_a_batch_without_weights_has_weights_of_one():
  model = network('paper')
  (batch,) = batches(1, size=8)
  plain = {name: value for name, value in batch.items() if name != 'weight'}
  state = initial(model)
  for step in (
    jax.jit(lambda batch: train_step(state, batch, KEY)[1]),
    jax.jit(lambda batch: eval_step(state, batch)),
  ):
    weighted, found = step(batch), step(plain)
    assert float(found.images) == 8
    assert dict(found) == dict(weighted)
    assert set(dict(found)) == {'loss', 'top1', 'top5'}
  devices = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda batch: train_step(state, batch, KEY, axis_name='data')[1],
    mesh=devices,
    in_specs=P('data'),
    out_specs=P(),
  )
  assert float(jax.jit(mapped)(plain).images) == 8


def test_a_loss_must_have_one_value_an_example():
  state, (batch,) = initial(network('paper')), batches(1, size=8)

  def mean(logits, labels):
    return cross_entropy(logits, labels).mean()

  for step in (lambda: train_step(state, batch, KEY, loss=mean), lambda: eval_step(state, batch, loss=mean)):
    with pytest.raises(
      ValueError, match=r'the losses \(of shape \(\)\) must have one value per example: \(8,\)'
    ):
      jax.eval_shape(step)


@pytest.mark.parametrize(('classes', 'names'), [(5, {'loss', 'top1'}), (6, {'loss', 'top1', 'top5'})])
def test_no_top5_of_fewer_than_six_classes(classes, names):
  logits, labels = jnp.zeros((2, classes)), jnp.zeros(2, jnp.int32)
  assert set(measure(logits, labels, cross_entropy(logits, labels), jnp.ones(2)).means()) == names


def given_gradient(state, batch, key):
  """A step whose gradients and loss are those of the batch."""
  updates, opt_state = state.tx.update(batch['gradients'], state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = Metrics({'loss': batch['loss']}, jnp.ones(()))
  return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics


@pytest.mark.parametrize(
  ('loss', 'fc8', 'conv1', 'peak_rate', 'goes'),
  [
    (1.0, 1.0, 1.0, None, True),
    (1.0, 1.0, 1.0, 0.1, True),
    (np.nan, 1.0, 1.0, 0.1, False),
    (1.0, np.inf, 1.0, None, False),
    (1.0, np.inf, 1.0, 0.1, False),
    (1.0, np.nan, 1.0, 0.1, False),
    (1.0, 1.0, np.nan, 0.1, True),  # of a layer that stays: nobody reads it
    (1.0, 1.0, 1.0, 1e30, False),  # a rate with which parameters would overflow
    (1.0, 1e20, 1.0, 0.1, False),
  ],
)
@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_an_update_that_is_not_finite_is_not_made(
  standard_promotion, loss, fc8, conv1, peak_rate, goes, policy
):
  params = {name: {'kernel': jnp.ones((2, 3))} for name in ('conv1', 'fc8')}
  tx = freeze(sgd(0.1 if peak_rate is None else peak_rate), ['conv1'])
  state = TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params), None, lambda: None, tx)
  gradients = {'conv1': {'kernel': jnp.full((2, 3), conv1)}, 'fc8': {'kernel': jnp.full((2, 3), fc8)}}
  step = jax.jit(guarded(given_gradient, policy, peak_rate, ['conv1']))
  batch = {'gradients': gradients, 'loss': jnp.asarray(loss)}
  new, _, going, _ = step(state, batch, KEY, jnp.array(True), jnp.zeros(1, bool))
  assert bool(going) == goes
  assert new.tx is tx
  np.testing.assert_array_equal(new.params['conv1']['kernel'], 1.0)
  np.testing.assert_allclose(new.params['fc8']['kernel'], 0.9 if goes else 1.0, rtol=1e-6)
  assert int(new.step) == (goes or policy == 'skip')
