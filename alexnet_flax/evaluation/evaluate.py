"""PretrainedModel networks scored on a data set by a named protocol."""

import concurrent.futures
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.image_header import pixels
from alexnet_flax.data.images import UnreadableError, pillow_view
from alexnet_flax.data.source import Example, Source
from alexnet_flax.data.views import EvalView
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.protocols import Protocol
from alexnet_flax.evaluation.scores import Answers
from alexnet_flax.pretrained import PretrainedModel, unnamed

_READ_AT_ONCE = 4096


def right_classes(source: Source) -> list[tuple[int, ...]]:
  """Of each example the classes that count as right; empty where none does (ReaL)."""
  found: list[tuple[int, ...]] = []
  for start in range(0, source.num_examples, _READ_AT_ONCE):
    numbers = np.arange(start, min(start + _READ_AT_ONCE, source.num_examples))
    found += [
      (example.label,) if example.right is None else example.right for example in source.read(numbers)
    ]
  return found


def answer(
  networks: Sequence[PretrainedModel],
  source: Source,
  protocol: Protocol,
  *,
  batch_size: int = 128,
  num_threads: int | None = None,
  left_out: set[int] | None = None,
) -> Answers:
  """The averaged answers of networks to every image of a data set that has a right one.

  The probabilities are the mean of the softmax over crops and networks (Krizhevsky et al. 2012, sections
  4.1 and 6.1). All devices are used.

  Args:
    networks: one or more.
    source: the data set.
    protocol: how they see it.
    batch_size: images at a time; made a multiple of the number of devices.
    num_threads: for decoding; one a core if None.
    left_out: takes the numbers of images that cannot be decoded, which are not counted then; an error if
      None.

  Raises:
    UsageError: the data set has other classes than the networks, or an image cannot be decoded.
  """
  for network in networks:
    _check_classes(network, source)
  right = right_classes(source)
  classes = {network.source: len(network.class_names) for network in networks}
  if len(set(classes.values())) > 1:
    raise UsageError(f'networks that are averaged must have the same classes ({classes})')
  allowed = None
  if protocol.allowed is not None:
    allowed = np.zeros(len(networks[0].class_names), bool)
    allowed[list(protocol.allowed)] = True
  counted = np.array([bool(some) for some in right])
  if not counted.any():
    raise UsageError(f'{source.name}: no image has a label')

  best, probabilities, losses = [], [], []
  labels = iter(some[0] if some else 0 for some in right)
  for batch in _probabilities(networks, source, protocol.view, allowed, batch_size, num_threads, left_out):
    if not np.isfinite(batch).all():
      raise UsageError(f'{" and ".join(classes)}: answers are not finite')
    order = np.argsort(-batch, axis=1, kind='stable')[:, :5]
    best.append(order)
    probabilities.append(np.take_along_axis(batch, order, 1))
    chosen = [next(labels) for _ in batch]
    least = np.finfo(np.float32).tiny  # a probability that float32 does not hold counts as this
    losses.append(-np.log(np.maximum(batch[np.arange(len(batch)), chosen], least)))
  counted[list(left_out or ())] = False
  answers = Answers(
    np.concatenate(best)[counted],
    np.concatenate(probabilities)[counted],
    np.concatenate(losses)[counted],
    [some for some, counts in zip(right, counted, strict=True) if counts],
    np.nonzero(counted)[0],
  )
  if sum(map(len, best)) != source.num_examples:
    raise AssertionError(f'{sum(map(len, best))} of {source.num_examples} images of {source.name} were seen')
  return answers


def _probabilities(
  networks: Sequence[PretrainedModel],
  source: Source,
  view: EvalView,
  allowed: np.ndarray | None,
  batch_size: int,
  num_threads: int | None,
  left_out: set[int] | None = None,
) -> Iterator[np.ndarray]:
  """float32 [B, C] of the data set's images in order."""
  from alexnet_flax.data import loader

  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
  sharding, replicated = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
  variables = jax.device_put([network.variables for network in networks], replicated)
  batch_size = -(-min(batch_size, source.num_examples) // jax.device_count()) * jax.device_count()
  mean = jax.jit(
    functools.partial(mean_probabilities, [network.model for network in networks], allowed=allowed),
    out_shardings=replicated,
  )
  if view.resize == 'pil':
    batches = _by_pillow(source, view, batch_size, num_threads, left_out)
  else:
    batches = loader.eval_batches(
      source, view, batch_size=batch_size, num_classes=len(source.class_names), num_threads=num_threads
    )
  done = 0
  with tqdm(
    total=source.num_examples, unit='image', desc=source.name, disable=not sys.stderr.isatty()
  ) as bar:
    for batch in loader.to_devices(batches, sharding):
      count = min(batch_size, source.num_examples - done)
      yield np.asarray(mean(variables, batch['image']))[:count]
      done += count
      bar.update(count)


def _by_pillow(
  source: Source, view: EvalView, batch_size: int, num_threads: int | None, left_out: set[int] | None
) -> Iterator[dict[str, np.ndarray]]:
  """The images decoded and resized by Pillow itself: what published figures were measured with, to the bit.

  TensorFlow's antialiasing, which training evaluates with, rounds otherwise by a level here and there.
  """

  def seen(number: int, example: Example) -> np.ndarray:
    try:
      return pillow_view(pixels(example.image), view)
    except UnreadableError as error:
      if left_out is not None:
        left_out.add(number)
        return pillow_view(np.zeros((view.resize_side, view.resize_side, 3), np.uint8), view)
      raise UsageError(f'{source.name}: {example.name or "an image"} cannot be decoded: {error}') from None

  with concurrent.futures.ThreadPoolExecutor(num_threads or os.cpu_count()) as threads:

    def begun(start: int) -> list[concurrent.futures.Future[np.ndarray]]:
      numbers = np.arange(start, min(start + batch_size, source.num_examples))
      return [
        threads.submit(seen, *pair) for pair in zip(numbers.tolist(), source.read(numbers), strict=True)
      ]

    ahead = begun(0)
    for start in range(0, source.num_examples, batch_size):
      now, ahead = ahead, begun(start + batch_size)
      views = np.stack([future.result() for future in now])
      filling = np.zeros((batch_size - len(views), *views.shape[1:]), np.uint8)
      yield {'image': np.concatenate([views, filling])}


def mean_probabilities(
  models: Sequence[Any], variables: Sequence[Any], images: jax.Array, allowed: np.ndarray | None = None
) -> jax.Array:
  """The mean of the softmax over networks and crops.

  Args:
    models: C classes each.
    variables: theirs.
    images: uint8 RGB [B, S, S, 3], or [B, V, S, S, 3] of V crops each.
    allowed: bool [C], which classes can be answered; all if None.

  Returns:
    float32 [B, C].
  """
  total = jnp.zeros(())
  for model, one in zip(models, variables, strict=True):
    flat = images.reshape(-1, *images.shape[-3:])
    batch = normalize({'image': flat}, preprocessing=model.spec.preprocessing)
    logits = model.apply(one, batch['image'], train=False)
    if allowed is not None:
      logits = jnp.where(allowed[None], logits, -jnp.inf)
    crops = jax.nn.softmax(logits).reshape(images.shape[0], -1, logits.shape[-1])
    total = crops.mean(1) + total
  return total / len(models)


def _check_classes(network: PretrainedModel, source: Source) -> None:
  theirs, ours = source.class_names, network.class_names
  if ours[: len(theirs)] == theirs and set(ours[len(theirs) :]) <= set(unnamed(len(ours))):
    return  # a head may be wider than the data set it was trained for
  if ours == unnamed(len(ours)) and len(ours) == len(theirs):
    return
  if len(theirs) != len(ours):
    what = f'{len(theirs)} classes, and {network.source} tells {len(ours)} apart'
  else:
    which = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    what = f'other classes than {network.source}: {theirs[which]!r} where that has {ours[which]!r}'
  raise UsageError(f'{source.name} has {what}; evaluate on the classes that it was trained for')
