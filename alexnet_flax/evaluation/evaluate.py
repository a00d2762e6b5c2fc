"""Runs trained networks on a data set, and collects their predictions."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from alexnet_flax.data.augment import standardize
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.source import Example, Source
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.adversarial import Attack
from alexnet_flax.evaluation.protocols import Protocol
from alexnet_flax.evaluation.scores import Predictions
from alexnet_flax.pretrained import PretrainedModel, unnamed

_TOP = 5


def correct_classes(source: Source) -> list[tuple[int, ...]]:
  """The classes that count as correct for each example; empty for images without a label (ReaL, or -1)."""

  def classes(example: Example) -> tuple[int, ...]:
    return (example.label,) * (example.label >= 0) if example.correct is None else example.correct

  return [classes(example) for example in source.scan_all()]


def predict_dataset(
  networks: Sequence[PretrainedModel],
  source: Source,
  protocol: Protocol,
  *,
  batch_size: int = 128,
  num_threads: int | None = None,
  bad: BadImages | None = None,
  keep_all: bool = False,
  attack: Attack | None = None,
) -> Predictions:
  """Predicts every labelled image of a data set, on all devices.

  Probabilities are the softmax averaged over crops and networks (Krizhevsky et al. 2012, sections 4.1 and
  6.1).

  Args:
    networks: One or more networks.
    source: The data set.
    protocol: The crops, and the classes that can be predicted.
    batch_size: Images per batch; rounded up to a multiple of the number of devices.
    num_threads: Decoding threads; one per core if None.
    bad: Handles images that cannot be decoded; skipped ones are not counted. An error if None.
    keep_all: Keep the log probabilities of all classes, 4 bytes each.
    attack: Changes the crops before they are predicted, so that the loss of the averaged probabilities grows;
      its random starts are the same in every call.

  Raises:
    UsageError: The data set's classes differ from the networks', or an image cannot be decoded.
  """
  for network in networks:
    require_classes(network, source)
  sizes = {network.source: len(network.class_names) for network in networks}
  if len(set(sizes.values())) > 1:
    raise UsageError(f'averaged networks must have the same classes ({sizes})')
  correct = correct_classes(source)
  counted = np.array([bool(classes) for classes in correct])
  if not counted.any():
    raise UsageError(f'{source.name}: no image has a label')

  top, probabilities, losses, decoded, kept = [], [], [], [], []
  first = np.array([classes[0] if classes else 0 for classes in correct], np.int32)
  labels = iter(first.tolist())
  data = source, protocol, batch_size, num_threads, bad
  for batch, weights in _log_probabilities(networks, *data, attack, first):
    if np.isnan(batch).any():
      raise UsageError(f'{" and ".join(sizes)}: the predictions are not finite')
    order = np.argsort(-batch, axis=1, kind='stable')[:, :_TOP]
    top.append(order)
    decoded.append(weights > 0)
    probabilities.append(np.exp(np.take_along_axis(batch, order, 1)))
    losses.append(-batch[np.arange(len(batch)), [next(labels) for _ in batch]])
    if keep_all:
      kept.append(batch)
  counted &= np.concatenate(decoded)
  return Predictions(
    np.concatenate(top)[counted],
    np.concatenate(probabilities)[counted],
    np.concatenate(losses)[counted],
    [classes for classes, counts in zip(correct, counted, strict=True) if counts],
    np.nonzero(counted)[0],
    np.concatenate(kept)[counted] if keep_all else None,
  )


def _log_probabilities(
  networks: Sequence[PretrainedModel],
  source: Source,
  protocol: Protocol,
  batch_size: int,
  num_threads: int | None,
  bad: BadImages | None,
  attack: Attack | None = None,
  labels: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields log probabilities, float32 [B, C], and weights [B], 0 for skipped images, for all in order."""
  from alexnet_flax.data import loader

  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
  sharding, replicated = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
  variables = jax.device_put([network.variables for network in networks], replicated)
  batch_size = -(-min(batch_size, source.num_examples) // jax.device_count()) * jax.device_count()
  allowed, classes = protocol.allowed, np.arange(len(networks[0].class_names))
  models = [network.model for network in networks]
  mask = None if allowed is None else np.isin(classes, allowed)
  mean = jax.jit(functools.partial(log_mean_probabilities, models, allowed=mask), out_shardings=replicated)
  views = list(dict.fromkeys(protocol.views))  # networks that see the same crops share them
  bads = [bad, *(bad and dataclasses.replace(bad) for _ in views[1:])]  # only the first view's are counted
  batches = [
    loader.to_devices(
      loader.eval_batches(source, view, batch_size=batch_size, num_threads=num_threads, bad=one), sharding
    )
    for view, one in zip(views, bads, strict=True)
  ]
  total = source.num_examples
  with tqdm(total=total, unit='image', desc=source.name, disable=not sys.stderr.isatty()) as bar:
    for start, by_view in enumerate(zip(*batches, strict=True)):
      count = min(batch_size, total - start * batch_size)
      images = [by_view[views.index(view)]['image'] for view in protocol.views]
      weights = np.min([np.asarray(batch['weight']) for batch in by_view], axis=0)
      if attack is not None and labels is not None:
        theirs = np.resize(labels[start * batch_size :][:count], batch_size)  # repeated for the padding
        key = jax.random.fold_in(jax.random.key(0), start)
        how = jax.device_put(theirs, sharding), np.float32(attack.epsilon), key
        (shared,) = (batch['image'] for batch in by_view)
        attacked = _changed(
          dataclasses.replace(attack, epsilon=0.0),  # so that one program serves every epsilon
          tuple(models),
          None if mask is None else tuple(mask.tolist()),
          variables,
          shared,
          *how,
        )
        images = [attacked] * len(models)
      yield np.asarray(mean(variables, images))[:count], weights[:count]
      bar.update(count)


def log_mean_probabilities(
  models: Sequence[Any],
  variables: Sequence[Any],
  images: Sequence[jax.Array],
  allowed: np.ndarray | None = None,
  least: float = -np.inf,
) -> jax.Array:
  """The logarithm of the softmax averaged over networks and crops; it does not underflow.

  Args:
    models: Networks with C classes each.
    variables: Their variables.
    images: What each network sees, RGB in 0 ... 255, uint8 or float, [B, S, S, 3], or [B, V, S, S, 3] with V
      crops each.
    allowed: bool [C], the classes that can be predicted; all if None.
    least: The logit of the others.

  Returns:
    float32 [B, C].
  """
  each = []
  for model, one, views in zip(models, variables, images, strict=True):
    flat = views.reshape(-1, *views.shape[-3:]).astype(jnp.float32)
    logits = model.apply(one, standardize(flat, model.spec.preprocessing), train=False)
    if allowed is not None:
      logits = jnp.where(allowed[None], logits, least)
    each.append(jax.nn.log_softmax(logits).reshape(views.shape[0], -1, logits.shape[-1]))
  crops = jnp.concatenate(each, axis=1)  # of all networks, as many of each
  return jax.nn.logsumexp(crops, axis=1) - np.log(np.float32(crops.shape[1]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _changed(
  attack: Attack,
  models: Sequence[Any],
  mask: tuple[bool, ...] | None,
  variables: Sequence[Any],
  images: jax.Array,
  labels: jax.Array,
  epsilon: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Returns images, uint8 [B, S, S, 3], after an attack on the averaged probabilities: float, 0 ... 255."""

  allowed = None if mask is None else np.array(mask)

  def log_probabilities(x: jax.Array) -> jax.Array:  # a loss of 0 * inf would be NaN
    return log_mean_probabilities(models, variables, [255.0 * x] * len(models), allowed, least=-1e9)

  return 255.0 * attack(log_probabilities, images.astype(jnp.float32) / 255.0, labels, epsilon, key)


def require_classes(network: PretrainedModel, source: Source) -> None:
  """Raises UsageError if a data set has other classes than those that a network was trained on."""
  theirs, ours = source.class_names, network.class_names
  if ours[: len(theirs)] == theirs and set(ours[len(theirs) :]) <= set(unnamed(len(ours))):
    return  # a head may be wider than the data set it was trained on
  if ours == unnamed(len(ours)) and len(ours) == len(theirs):
    return
  if len(theirs) != len(ours):
    what = f'{len(theirs)} classes, but {network.source} has {len(ours)}'
  else:
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    what = f'other classes than {network.source}: {theirs[first]!r} instead of {ours[first]!r}'
  raise UsageError(f'{source.name} has {what}; evaluate on the classes that the network was trained on')
