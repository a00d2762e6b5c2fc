"""Trained networks scored on a data set by a named protocol."""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from alexnet_flax.augment import normalize
from alexnet_flax.class_names import unnamed
from alexnet_flax.data.datasets import open_dataset, split_names
from alexnet_flax.data.source import Source
from alexnet_flax.data.views import EvalView, Resize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.geometry import side_lengths
from alexnet_flax.imagenet_sets import known_set
from alexnet_flax.scoring import Answers
from alexnet_flax.trained import Trained

PROTOCOLS = {'1-crop': False, 'ten-crop': True}
_READ_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How pictures are shown to the networks, and which answers are allowed.

  Attributes:
    view: the crops.
    restricted: whether only classes that occur in the data set can be answered.
  """

  view: EvalView
  restricted: bool = False

  def __str__(self) -> str:
    view = self.view
    crops = 'ten crops' if view.ten_crop else '1 crop'
    text = f'{crops} of {view.image_size}x{view.image_size}, short side {view.resize_side} ({view.resize})'
    return f'{text}, the classes that occur' if self.restricted else text


def protocol_of(
  networks: Sequence[Trained],
  name: str = '1-crop',
  resize: Resize = 'pil',
  size: int | None = None,
  restricted: bool = False,
) -> Protocol:
  """A protocol by its name, for networks that are to see the same pictures.

  Args:
    networks: which give the short side and, if `size` is None, the side of the crops.
    name: one of `PROTOCOLS`.
    resize: as Pillow does it, or TensorFlow.
    size: of the crops, such as 224 or 227.
    restricted: see `Protocol`.

  Raises:
    UsageError: there is no such protocol, a network cannot see crops of that side, or two networks
      want different ones.
  """
  if name not in PROTOCOLS:
    raise unknown_name('protocol', name, PROTOCOLS)
  views = {}
  for network in networks:
    spec = network.spec
    side = size or spec.image_size
    # fc6 has as many inputs as the last pooling leaves values.
    final, needed = (list(side_lengths(spec, s).values())[-1] for s in (side, spec.image_size))
    if final != needed:
      raise UsageError(
        f'{network.source} cannot see crops of {side}x{side}: {final}x{final} are left of them at its last'
        f' pooling, and it is made for {needed}x{needed}; its own size is {spec.image_size}'
      )
    views[EvalView(side, round(spec.image_size / spec.preprocessing.center_crop_share), resize)] = network
  if len(views) > 1:
    seen = '; '.join(f'{one.source}: {view.image_size} of {view.resize_side}' for view, one in views.items())
    raise UsageError(f'networks that are averaged must see the same crops ({seen}); give --size')
  (view,) = views
  return Protocol(dataclasses.replace(view, ten_crop=PROTOCOLS[name]), restricted)


def open_evaluated(dataset: str, data_dir: str | None = None) -> Source:
  """The split that NAME[:SPLIT] means: of ImageNet's family the published one, else 'test' or 'validation'.

  Raises:
    UsageError: there is no such data set or split, or it is not prepared.
  """
  match = re.fullmatch(r'([^:]+(?::\d+\.\d+\.\d+)?)(?::(.+))?', dataset)
  if match is None:
    raise UsageError(f'--dataset={dataset}: write NAME or NAME:SPLIT, such as cifar10:test')
  name, split = match.groups()
  if split is None:
    known, splits = known_set(name), split_names(name, data_dir)
    wanted = [known.split] if known else ['test', 'validation']
    split = next((one for one in wanted if one in splits), None)
    if split is None:
      raise UsageError(f'{name} has no split {" or ".join(wanted)}; write {name}:SPLIT ({", ".join(splits)})')
  return open_dataset(name, split, data_dir)


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
  networks: Sequence[Trained],
  source: Source,
  protocol: Protocol,
  *,
  batch_size: int = 128,
  num_threads: int | None = None,
) -> Answers:
  """The averaged answers of networks to every picture of a data set that has a right one.

  The probabilities are the mean of the softmax over crops and networks (Krizhevsky et al. 2012, sections
  4.1 and 6.1). All devices are used.

  Args:
    networks: one or more.
    source: the data set.
    protocol: how they see it.
    batch_size: pictures at a time; made a multiple of the number of devices.
    num_threads: for decoding; one a core if None.

  Raises:
    UsageError: the data set has other classes than the networks, or a picture cannot be decoded.
  """
  for network in networks:
    _check_classes(network, source)
  right = right_classes(source)
  allowed = None
  if protocol.restricted:
    allowed = np.zeros(len(source.class_names), bool)
    allowed[sorted({one for classes in right for one in classes})] = True
  counted = np.array([bool(classes) for classes in right])
  if not counted.any():
    raise UsageError(f'{source.name}: no picture has a label')

  best, probabilities, losses = [], [], []
  labels = iter(classes[0] if classes else 0 for classes in right)
  for batch in _probabilities(networks, source, protocol.view, allowed, batch_size, num_threads):
    order = np.argsort(-batch, axis=1, kind='stable')[:, :5]
    best.append(order)
    probabilities.append(np.take_along_axis(batch, order, 1))
    chosen = [next(labels) for _ in batch]
    least = np.finfo(np.float32).tiny  # a probability that float32 does not hold counts as this
    losses.append(-np.log(np.maximum(batch[np.arange(len(batch)), chosen], least)))
  answers = Answers(
    np.concatenate(best)[counted],
    np.concatenate(probabilities)[counted],
    np.concatenate(losses)[counted],
    [classes for classes in right if classes],
  )
  if sum(map(len, best)) != source.num_examples:
    raise AssertionError(
      f'{sum(map(len, best))} of {source.num_examples} pictures of {source.name} were seen'
    )
  return answers


def _probabilities(
  networks: Sequence[Trained],
  source: Source,
  view: EvalView,
  allowed: np.ndarray | None,
  batch_size: int,
  num_threads: int | None,
) -> Iterator[np.ndarray]:
  """float32 [B, C] of the data set's pictures in order."""
  from alexnet_flax.data import pipeline

  mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
  sharding, replicated = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
  variables = jax.device_put([network.variables for network in networks], replicated)
  batch_size = -(-min(batch_size, source.num_examples) // jax.device_count()) * jax.device_count()
  mean = jax.jit(
    functools.partial(mean_probabilities, [network.model for network in networks], allowed=allowed),
    out_shardings=replicated,
  )
  batches = pipeline.eval_batches(
    source, view, batch_size=batch_size, num_classes=len(source.class_names), num_threads=num_threads
  )
  done = 0
  with tqdm(
    total=source.num_examples, unit='picture', desc=source.name, disable=not sys.stderr.isatty()
  ) as bar:
    for batch in pipeline.to_devices(batches, sharding):
      count = min(batch_size, source.num_examples - done)
      yield np.asarray(mean(variables, batch['image']))[:count]
      done += count
      bar.update(count)


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
    pictures = images.reshape(-1, *images.shape[-3:])
    batch = normalize({'image': pictures}, preprocessing=model.spec.preprocessing)
    logits = model.apply(one, batch['image'], train=False)
    if allowed is not None:
      logits = jnp.where(allowed[None], logits, -jnp.inf)
    crops = jax.nn.softmax(logits).reshape(images.shape[0], -1, logits.shape[-1])
    total = crops.mean(1) + total
  return total / len(models)


def _check_classes(network: Trained, source: Source) -> None:
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
