"""Loads what a report shows of a run: network, data, logged metrics and predictions."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.config import Config
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.data.images import UnreadableError, evaluation_crops
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.evaluate import predict_dataset
from alexnet_flax.evaluation.protocols import Protocol, protocol_of
from alexnet_flax.evaluation.scores import Predictions
from alexnet_flax.pretrained import PretrainedModel, load_pretrained, run_config
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.workdir import read_environment


class Sources(NamedTuple):
  """The data of a run."""

  train: Source
  evaluated: Source


@dataclasses.dataclass(frozen=True)
class RunResults:
  """A run to report on.

  Attributes:
    name: The name of its folder, or the path if several runs have the same name.
    config: Its configuration.
    network: The network at its last checkpoint.
    sources: Its data, or None if they are not available.
    metrics: The lines of metrics.jsonl.
    environment: Versions, command, commit and devices.
  """

  name: str
  config: Config
  network: PretrainedModel
  sources: Sources | None
  metrics: list[dict[str, Any]]
  environment: dict[str, Any]

  @functools.cached_property
  def protocol(self) -> Protocol:
    """The evaluation protocol of the run."""
    view = self.config.data.eval_view
    return protocol_of([self.network], 'ten-crop' if view.ten_crop else '1-crop', view.resize)

  @functools.cached_property
  def predictions(self) -> Predictions | None:
    """The predictions for the evaluated split; None without the data."""
    if self.sources is None:
      return None
    data = self.config.data
    return predict_dataset(
      [self.network],
      self.sources.evaluated,
      self.protocol,
      batch_size=data.eval_batch_size or 128,
      num_threads=data.num_threads,
      bad=BadImages(data.on_bad_image, say=lambda line: None),  # the run has named them,
    )

  @property
  def eval_split(self) -> str:
    """The name of the evaluated split in the log."""
    return next((line['split'] for line in self.metrics if line['split'] != 'train'), 'test')

  def curve(self, split: str, name: str) -> tuple[list[float], list[float]]:
    """Returns the epochs and values of a logged metric."""
    lines = [line for line in self.metrics if (line['split'], line['name']) == (split, name)]
    return [line['epoch'] for line in lines], [line['value'] for line in lines]

  def views(self, source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decodes images; returns the indices of those that can be, and central crops, uint8 [N, S, S, 3]."""
    view = dataclasses.replace(self.protocol.view, ten_crop=False)
    kept, views = [], []
    for index, example in zip(indices.tolist(), source.read(indices), strict=True):
      with contextlib.suppress(UnreadableError):
        views.append(evaluation_crops(decode_pixels(example.image), view))
        kept.append(index)
    return np.array(kept, np.int64), np.array(views).reshape(-1, view.image_size, view.image_size, 3)


def load_results(folder: str, data_dir: str | None = None) -> RunResults:
  """Loads a run from its folder.

  Args:
    folder: The folder of the run.
    data_dir: The folder of its data sets; the configuration's if None.

  Raises:
    UsageError: It is not the folder of a run, or has no complete checkpoint.
  """
  config = run_config(folder)
  network = load_pretrained(folder)
  path = pathlib.Path(folder).expanduser()
  data_dir = data_dir or config.data.data_dir
  sources: Sources | None = None
  try:
    if (data_dir or '').startswith('.../'):  # runs do not record the user's folders
      raise UsageError(f'the data were in a folder {data_dir}')
    splits = (config.data.train_split, config.data.eval_split)
    sources = Sources(*(open_dataset(config.data.dataset, split, data_dir) for split in splits))
  except UsageError as error:
    print(f'note: {folder}: report without images: {error}; give --data_dir', file=sys.stderr)
  return RunResults(path.resolve().name, config, network, sources, read_metrics(path), read_environment(path))
