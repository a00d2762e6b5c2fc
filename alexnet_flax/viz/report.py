"""`alexnet-flax report`: writes the HTML page of one run, or of several side by side."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alexnet_flax.config import all_keys, value_of
from alexnet_flax.errors import UsageError
from alexnet_flax.files import write_text
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import data_uri, filter_tiles, first_kernel, page_template
from alexnet_flax.viz.report_images import EvaluationSection, evaluation_section
from alexnet_flax.viz.report_run import RunResults

FILE = 'report.html'


@dataclasses.dataclass(frozen=True)
class Content:
  """What the page shows of one run: numbers, names, and images as text."""

  results: RunResults
  parameters: int
  charts: list[tuple[str, str]]  # (title, SVG)
  filters: str
  filters_caption: str
  class_names: tuple[str, ...]
  facts: dict[str, str]
  configuration: dict[str, str]
  evaluation: EvaluationSection | None


def write_report(runs: Sequence[RunResults], path: pathlib.Path) -> None:
  """Writes a page about one run, or about several with a comparison.

  Args:
    runs: The runs.
    path: The file to write.

  Raises:
    UsageError: The file cannot be written.
  """
  contents = [content(results) for results in runs]
  page = page_template('report.html').render(
    title=' · '.join(results.name for results in runs),
    runs=contents,
    comparison=_comparison(contents) if len(contents) > 1 else None,
  )
  try:
    write_text(path, page)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}') from None


def content(results: RunResults) -> Content:
  """Collects everything that the page shows of a run."""
  network, config = results.network, results.config
  kernel = first_kernel(network.spec, network.variables['params'])
  return Content(
    results,
    network.num_parameters,
    list(_charts(results)),
    data_uri(filter_tiles(kernel), exact=True),
    f'{kernel.shape[-1]} filters of {kernel.shape[0]}x{kernel.shape[1]}x3',
    network.readable_names,
    _facts(results),
    {key: json.dumps(value_of(config, key)) for key in all_keys()},
    evaluation_section(results),
  )


def _charts(results: RunResults) -> Iterator[tuple[str, str]]:
  """Yields title and SVG of each chart that has data."""
  both = ('train', results.eval_split)
  for title, label, name, splits in (
    ('Loss', 'loss', 'loss', both),
    ('Top-1 accuracy', 'top-1', 'top1', both),
    ('Top-5 accuracy', 'top-5', 'top5', both),
    ('Learning rate', 'learning rate', 'learning_rate', ('train',)),
    ('Throughput', 'images per second', 'images_per_second', ('train',)),
  ):
    curves = [Series(split, *results.curve(split, name), color=i) for i, split in enumerate(splits)]
    if logged := [curve for curve in curves if curve.xs]:
      yield title, line_chart(logged, 'epoch', label, percent=name in ('top1', 'top5'))


def _facts(results: RunResults) -> dict[str, str]:
  """Returns speed, versions, commit and command."""
  environment, metrics = results.environment, results.metrics
  speeds = results.curve('train', 'images_per_second')[1]
  facts = {
    'steps': f'{metrics[-1]["step"]:,} ({metrics[-1]["epoch"]:g} epochs)' if metrics else 'none logged',
    'time': f'{metrics[-1]["seconds"]:,.0f} s of training and evaluation' if metrics else '',
    'speed': f'{np.median(speeds):,.0f} images/s (median of {len(speeds)} intervals)' if speeds else '',
    **{key: environment.get(key) or '' for key in ('devices', 'platform', 'command', 'commit')},
    **environment.get('versions', {}),
  }
  return {name: value for name, value in facts.items() if value}


def _comparison(runs: Sequence[Content]) -> dict[str, Any]:
  """Charts with the curves of all runs, and the keys in which their configurations differ."""
  charts = []
  for title, label, name in (('Evaluation loss', 'loss', 'loss'), ('Top-1 accuracy', 'top-1', 'top1')):
    series = [
      Series(run.results.name, *run.results.curve(run.results.eval_split, name), color=number)
      for number, run in enumerate(runs)
    ]
    charts.append((title, line_chart(series, 'epoch', label, percent=name == 'top1')))
  values = {key: [run.configuration[key] for run in runs] for key in runs[0].configuration}
  differences = [(key, each) for key, each in values.items() if len(set(each)) > 1]
  return {'charts': charts, 'differences': differences}
