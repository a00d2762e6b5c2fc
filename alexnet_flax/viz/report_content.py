"""What a report shows of one run, ready for the page: numbers, names, images as text."""

import dataclasses
import json
from typing import Any

import numpy as np

from alexnet_flax.config import all_keys, value_of
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import data_uri, filter_tiles, first_kernel
from alexnet_flax.viz.report_images import ShownImages, shown_images
from alexnet_flax.viz.report_run import Subject


@dataclasses.dataclass(frozen=True)
class Content:
  """A run on the page."""

  subject: Subject
  parameters: int
  charts: list[tuple[str, str]]  # (title, SVG)
  filters: str
  filters_caption: str
  class_names: tuple[str, ...]
  facts: dict[str, str]
  configuration: list[tuple[str, str]]
  shown: ShownImages | None


def content(subject: Subject) -> Content:
  """Everything that is shown of a run."""
  network = subject.network
  kernel = first_kernel(network.spec, network.variables['params'])
  return Content(
    subject,
    network.num_parameters,
    [
      (title, line_chart(series, 'epoch', label, **options))
      for title, label, series, options in _curves(subject)
    ],
    data_uri(filter_tiles(kernel), exact=True),
    f'{kernel.shape[-1]} filters of {kernel.shape[0]}x{kernel.shape[1]}x3',
    network.readable_names,
    _facts(subject),
    configuration(subject),
    shown_images(subject),
  )


def curve(subject: Subject, split: str, name: str) -> tuple[list[float], list[float]]:
  """Epochs and values of one logged name."""
  lines = [line for line in subject.metrics if (line['split'], line['name']) == (split, name)]
  return [line['epoch'] for line in lines], [line['value'] for line in lines]


def evaluated_split(subject: Subject) -> str:
  """The name of the evaluated split in the log."""
  return next((line['split'] for line in subject.metrics if line['split'] != 'train'), 'test')


def configuration(subject: Subject) -> list[tuple[str, str]]:
  """Every key with its value."""
  return [(key, json.dumps(value_of(subject.config, key))) for key in all_keys()]


def _curves(subject: Subject) -> Any:
  """(title, axis label, series, options) of each chart with something in it."""
  split = evaluated_split(subject)
  charts: list[tuple[str, str, list[tuple[str, str]], dict[str, bool]]] = [
    ('Loss', 'loss', [('train', 'loss'), (split, 'loss')], {}),
    ('Accuracy, the first answer', 'top-1', [('train', 'top1'), (split, 'top1')], {'percent': True}),
    ('Accuracy, five answers', 'top-5', [('train', 'top5'), (split, 'top5')], {'percent': True}),
    ('Learning rate', 'learning rate', [('train', 'learning_rate')], {}),
    ('Speed', 'images per second', [('train', 'images_per_second')], {}),
  ]
  for title, label, wanted, options in charts:
    series = [
      Series(source, *curve(subject, source, name), color=number)
      for number, (source, name) in enumerate(wanted)
      if curve(subject, source, name)[0]
    ]
    if series:
      yield title, label, series, options


def _facts(subject: Subject) -> dict[str, str]:
  """Speed, versions, commit and command."""
  environment, metrics = subject.environment, subject.metrics
  speeds = curve(subject, 'train', 'images_per_second')[1]
  facts = {
    'steps': f'{metrics[-1]["step"]:,} ({metrics[-1]["epoch"]:g} epochs)' if metrics else 'none logged',
    'time': f'{metrics[-1]["seconds"]:,.0f} s of training and evaluating' if metrics else '',
    'speed': f'{np.median(speeds):,.0f} images/s (median of {len(speeds)} spans)' if speeds else '',
    'devices': environment.get('devices', ''),
    'platform': environment.get('platform', ''),
    'command': environment.get('command', ''),
    'commit': environment.get('commit') or '',
    **environment.get('versions', {}),
  }
  return {name: value for name, value in facts.items() if value}
