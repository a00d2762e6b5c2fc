"""Evaluation protocols by name, and the data sets they are applied to."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset, split_names
from alexnet_flax.data.views import EvalView, Resize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.evaluation.imagenet import known_set
from alexnet_flax.pretrained import PretrainedModel

PROTOCOLS = {'1-crop': False, 'ten-crop': True}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How images are cropped for each network, and which classes can be predicted (all if None)."""

  views: tuple[EvalView, ...]
  allowed: tuple[int, ...] | None = None

  @property
  def view(self) -> EvalView:
    """The view of the first network; others differ at most in their sides."""
    return self.views[0]

  def with_views(self, **changes: Any) -> 'Protocol':
    """Returns the protocol with the same changes in every view."""
    return dataclasses.replace(self, views=tuple(dataclasses.replace(view, **changes) for view in self.views))

  def __str__(self) -> str:
    view = self.view
    sides = dict.fromkeys(f'{x.image_size}x{x.image_size}, short side {x.resize_side}' for x in self.views)
    crops = '10 crops' if view.ten_crop else '1 crop'
    text = f'{crops} of {" and of ".join(sides)}, resized by {view.resize}'
    text += {True: ', upright', False: ', as stored', None: ''}[view.turn]
    return text if self.allowed is None else f'{text}, restricted to {len(self.allowed)} classes'


def protocol_of(
  networks: Sequence[PretrainedModel],
  name: str = '1-crop',
  resize: Resize = 'pil',
  size: int | None = None,
  allowed: tuple[int, ...] | None = None,
) -> Protocol:
  """Returns a protocol by name; each network sees crops of its own size, unless `size` says another.

  Args:
    networks: The networks. Each determines its short side and, if `size` is None, the side of its crops.
    name: One of `PROTOCOLS`.
    resize: 'pil' or 'tf'; see `EvalView`.
    size: The side of the crops, such as 224 or 227.
    allowed: See `Protocol`.

  Raises:
    UsageError: There is no such protocol, or crops of that side do not fit a network.
  """
  if name not in PROTOCOLS:
    raise unknown_name('protocol', name, PROTOCOLS)
  views = []
  for network in networks:
    spec = network.spec
    side = spec.image_size if size is None else size
    # The size after the last pooling determines the number of fc6's inputs.
    final, needed = (list(spec.side_lengths(s).values())[-1] for s in (side, spec.image_size))
    if final != needed:
      raise UsageError(
        f'crops of {side}x{side} do not fit {network.source}: its last pooling gives {final}x{final}, but its'
        f' weights need {needed}x{needed}; its own crop size is {spec.image_size}'
      )
    short = round(spec.image_size / spec.preprocessing.center_crop_share)
    views.append(EvalView(side, short, resize, ten_crop=PROTOCOLS[name]))
  return Protocol(tuple(views), allowed)


def open_evaluated(dataset: str, data_dir: str | None = None, any_count: bool = True) -> Source:
  """Opens NAME[:SPLIT].

  The default split is the published one for ImageNet's sets, otherwise 'test' or 'validation'. A published
  set, unless it is sliced, must have all of its images if `any_count` is False.

  Raises:
    UsageError: There is no such data set or split, it is not prepared, or it is not whole.
  """
  name, split = split_name(dataset)
  known = known_set(name)
  if split is None:
    splits, wanted = split_names(name, data_dir), [known.split] if known else ['test', 'validation']
    split = next((one for one in wanted if one in splits), None)
    if split is None:
      raise UsageError(f'{name} has no split {" or ".join(wanted)}; write {name}:SPLIT ({", ".join(splits)})')
  source = open_dataset(name, split, data_dir)
  if known and '[' not in split and source.num_examples != known.images and not any_count:
    raise UsageError(
      f'{source.name} has {source.num_examples:,} images here, but published results are over'
      f' {known.images:,}; prepare all of it, or give --any_count'
    )
  return source


def split_name(dataset: str) -> tuple[str, str | None]:
  """Splits NAME[:SPLIT] into NAME and SPLIT; the name may end in a version.

  >>> split_name('imagenet_v2/matched-frequency:3.0.0'), split_name('cifar10:test[:50%]')
  (('imagenet_v2/matched-frequency:3.0.0', None), ('cifar10', 'test[:50%]'))

  Raises:
    UsageError: The text has another form.
  """
  if match := re.fullmatch(r'([^:]+(?::\d+\.\d+\.\d+)?)(?::(.+))?', dataset):
    return match[1], match[2]
  raise UsageError(f'--dataset={dataset}: write NAME or NAME:SPLIT, such as cifar10:test')
