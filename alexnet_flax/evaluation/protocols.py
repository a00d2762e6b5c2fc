"""Evaluation protocols by name, and the data set that a name means."""

import dataclasses
import re
from collections.abc import Sequence

from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset, split_names
from alexnet_flax.data.views import EvalView, Resize
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.evaluation.imagenet import known_set
from alexnet_flax.pretrained import PretrainedModel

PROTOCOLS = {'1-crop': False, 'ten-crop': True}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How images are shown to the networks, and which answers are allowed.

  Attributes:
    view: the crops.
    allowed: the classes that can be answered; all if None.
  """

  view: EvalView
  allowed: tuple[int, ...] | None = None

  def __str__(self) -> str:
    view = self.view
    crops = 'ten crops' if view.ten_crop else '1 crop'
    text = f'{crops} of {view.image_size}x{view.image_size}, short side {view.resize_side} ({view.resize})'
    return text if self.allowed is None else f'{text}, {len(self.allowed)} classes allowed'


def protocol_of(
  networks: Sequence[PretrainedModel],
  name: str = '1-crop',
  resize: Resize = 'pil',
  size: int | None = None,
  allowed: tuple[int, ...] | None = None,
) -> Protocol:
  """A protocol by its name, for networks that are to see the same images.

  Args:
    networks: which give the short side and, if `size` is None, the side of the crops.
    name: one of `PROTOCOLS`.
    resize: as Pillow does it, or TensorFlow.
    size: of the crops, such as 224 or 227.
    allowed: see `Protocol`.

  Raises:
    UsageError: there is no such protocol, a network cannot see crops of that side, or two networks
      want different ones.
  """
  if name not in PROTOCOLS:
    raise unknown_name('protocol', name, PROTOCOLS)
  views = {}
  for network in networks:
    spec = network.spec
    side = spec.image_size if size is None else size
    # fc6 has as many inputs as the last pooling leaves values.
    final, needed = (list(spec.side_lengths(s).values())[-1] for s in (side, spec.image_size))
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
  return Protocol(dataclasses.replace(view, ten_crop=PROTOCOLS[name]), allowed)


def open_evaluated(dataset: str, data_dir: str | None = None) -> Source:
  """The split that NAME[:SPLIT] means: of ImageNet's family the published one, else 'test' or 'validation'.

  Raises:
    UsageError: there is no such data set or split, or it is not prepared.
  """
  name, split = split_name(dataset)
  if split is None:
    known, splits = known_set(name), split_names(name, data_dir)
    wanted = [known.split] if known else ['test', 'validation']
    split = next((one for one in wanted if one in splits), None)
    if split is None:
      raise UsageError(f'{name} has no split {" or ".join(wanted)}; write {name}:SPLIT ({", ".join(splits)})')
  return open_dataset(name, split, data_dir)


def split_name(dataset: str) -> tuple[str, str | None]:
  """NAME and SPLIT of NAME[:SPLIT]; a name may end in a version.

  >>> split_name('imagenet_v2/matched-frequency:3.0.0'), split_name('cifar10:test[:50%]')
  (('imagenet_v2/matched-frequency:3.0.0', None), ('cifar10', 'test[:50%]'))

  Raises:
    UsageError: it is no such thing.
  """
  match = re.fullmatch(r'([^:]+(?::\d+\.\d+\.\d+)?)(?::(.+))?', dataset)
  if match is None:
    raise UsageError(f'--dataset={dataset}: write NAME or NAME:SPLIT, such as cifar10:test')
  return match[1], match[2]
