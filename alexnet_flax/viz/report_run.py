"""A run to report on: its network, its data, and what it logged."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.config import Config
from alexnet_flax.data.image_header import pixels
from alexnet_flax.data.images import UnreadableError, pillow_view
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.evaluate import answer
from alexnet_flax.evaluation.protocols import Protocol, protocol_of
from alexnet_flax.evaluation.scores import Answers
from alexnet_flax.pretrained import PretrainedModel, load_pretrained, run_config
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.workdir import read_environment


class Sources(NamedTuple):
  """The data of a run."""

  train: Source
  evaluated: Source


@dataclasses.dataclass(frozen=True)
class Subject:
  """A run to report on.

  Attributes:
    name: its folder's; the path, where folders of one name are compared.
    config: its configuration.
    network: at its last checkpoint.
    sources: its data; None where they are not at hand.
    metrics: the lines of metrics.jsonl.
    environment: versions, command, commit, devices.
  """

  name: str
  config: Config
  network: PretrainedModel
  sources: Sources | None
  metrics: list[dict[str, Any]]
  environment: dict[str, Any]

  @functools.cached_property
  def protocol(self) -> Protocol:
    """How the run evaluates."""
    view = self.config.data.eval_view
    return protocol_of([self.network], 'ten-crop' if view.ten_crop else '1-crop', view.resize)

  @functools.cached_property
  def answers(self) -> Answers | None:
    """To all images of the evaluated split."""
    if self.sources is None:
      return None
    data = self.config.data
    return answer(
      [self.network],
      self.sources.evaluated,
      self.protocol,
      batch_size=data.eval_batch_size or 128,
      num_threads=data.num_threads,
      left_out=set() if data.on_bad_image == 'skip' else None,
    )

  def views(self, source: Source, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of some images that can be decoded, int [N], and their central crops, uint8 [N, S, S, 3]."""
    view = dataclasses.replace(self.protocol.view, ten_crop=False)
    kept, views = [], []
    for number, example in zip(numbers.tolist(), source.read(numbers), strict=True):
      with contextlib.suppress(UnreadableError):
        views.append(pillow_view(pixels(example.image), view))
        kept.append(number)
    return np.array(kept, np.int64), np.array(views).reshape(-1, view.image_size, view.image_size, 3)


def load_subject(folder: str, data_dir: str | None = None) -> Subject:
  """A run by its folder.

  Args:
    folder: the run's.
    data_dir: where its data lie; where its configuration says, if None.

  Raises:
    UsageError: it is no run's folder, or has no whole checkpoint.
  """
  config = run_config(folder)
  network = load_pretrained(folder)
  path = pathlib.Path(folder).expanduser()
  place = data_dir or config.data.data_dir
  sources: Sources | None = None
  try:
    if (place or '').startswith('.../'):  # the rest is not written down
      raise UsageError(f'its data lay in a folder {place}')
    splits = (config.data.train_split, config.data.eval_split)
    sources = Sources(*(open_dataset(config.data.dataset, split, place) for split in splits))
  except UsageError as error:
    print(f'note: {folder}: a report without images: {error}; give --data_dir', file=sys.stderr)
  name, metrics = path.resolve().name, read_metrics(path)
  return Subject(name, config, network, sources, metrics, read_environment(path))
