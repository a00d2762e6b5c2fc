"""`alexnet-flax report`: writes the HTML page of one run, or of several side by side."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alexnet_flax.config import Config, all_keys, value_of
from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.image_header import decode_pixels
from alexnet_flax.data.images import UnreadableError, evaluation_crops
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.evaluate import predict_dataset
from alexnet_flax.evaluation.protocols import Protocol, protocol_of
from alexnet_flax.evaluation.scores import Predictions, most_confused
from alexnet_flax.files import check_writable, write_text
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.inference.layer_stats import layer_statistics
from alexnet_flax.models.spec import Dropout, Flatten
from alexnet_flax.pretrained import PretrainedModel, find_run, load_pretrained, run_config, run_data
from alexnet_flax.training.experiment import chosen_examples
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.workdir import read_environment, read_history
from alexnet_flax.viz.charts import Series, line_chart
from alexnet_flax.viz.figures import data_uri, filter_tiles, first_kernel, page_template

FILE = 'report.html'
_PANEL = 8  # images, as in figure 4 of Krizhevsky et al. 2012
_MISTAKES = 8
_QUERIES, _NEIGHBOURS, _GALLERY = 5, 6, 2000
_FEW_CLASSES = 30  # up to which the whole confusion matrix is shown
_STATISTICS_OVER = 64
_WITH_IMAGES = re.compile(r'id="run-\d+-panel"')  # a section of a run whose data were available


@dataclasses.dataclass(frozen=True)
class RunResults:
  """A run to report on."""

  name: str  # of its folder, or the path if several runs have the same name
  config: Config
  network: PretrainedModel  # at one of its checkpoints
  sources: tuple[Source, Source] | None  # of training and evaluation, if they are available
  metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
  environment: dict[str, Any]  # versions, command, commit and devices
  history: list[dict[str, Any]]  # changes of the configuration: the lines of config_history.jsonl

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
      self.sources[1],
      self.protocol,
      batch_size=data.eval_batch_size or 128,
      num_threads=data.num_threads,
      # Training has already named them.
      bad=BadImages(data.on_bad_image, lambda line: None, max_pixels=data.max_pixels),
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
    turn, max_pixels = not source.is_published, self.config.data.max_pixels
    kept, views = [], []
    for index, example in zip(indices.tolist(), source.read(indices), strict=True):
      with contextlib.suppress(UnreadableError):
        views.append(evaluation_crops(decode_pixels(example.image, turn, max_pixels), view))
        kept.append(index)
    return np.array(kept, np.int64), np.array(views).reshape(-1, view.image_size, view.image_size, 3)


def load_results(folder: str, data_dir: str | None = None) -> RunResults:
  """Loads a run from its folder.

  Args:
    folder: The folder of the run; RUN@best or RUN@STEP for another checkpoint than the last.
    data_dir: The folder of its data sets; where they lay in training if None.

  Raises:
    UsageError: It is not the folder of a run, or has no complete checkpoint.
  """
  config = run_config(folder)
  network = load_pretrained(folder)
  path, which = find_run(folder) or (pathlib.Path(folder), None)
  sources = None
  try:
    data = run_data(folder, data_dir)
    splits = data.train_split, data.eval_split
    train, evaluated = (open_dataset(data.dataset, split, data.data_dir) for split in splits)
    sources = chosen_examples(data, config.seed, train, evaluated)
  except UsageError as error:
    note = f'{folder}: report without images: {error}; give --data_dir if they lie elsewhere'
    print(f'note: {note}', file=sys.stderr)
  name = path.resolve().name + (f'@{which}' if which else '')
  records = read_metrics(path), read_environment(path), read_history(path)
  return RunResults(name, config, network, sources, *records)


def write_report(runs: Sequence[RunResults], path: pathlib.Path) -> None:
  """Writes a page about one run, or about several with a comparison.

  Raises:
    UsageError: The file cannot be written, or shows images of more runs than this page would.
  """
  check_writable(path)
  with_images = sum(results.sources is not None for results in runs)
  before = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
  if with_images < len(_WITH_IMAGES.findall(before)):
    raise UsageError(f'{path} shows images, which this report would not; give --data_dir, or another --out')
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


def content(results: RunResults) -> dict[str, Any]:
  """Collects everything that the page shows of a run: numbers, names, and images as text."""
  network = results.network
  kernel = first_kernel(network.spec, network.variables['params'])
  return {
    'results': results,
    'parameters': network.num_parameters,
    'charts': list(_charts(results)),
    'filters': data_uri(filter_tiles(kernel), exact=True),
    'filters_caption': f'{kernel.shape[-1]} filters of {kernel.shape[0]}x{kernel.shape[1]}x3',
    'class_names': network.readable_names,
    'facts': _facts(results),
    'configuration': {key: json.dumps(value_of(results.config, key)) for key in all_keys()},
    'evaluation': evaluation_section(results),
  }


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
    if name == 'top5' and len(results.network.class_names) < 6:  # always right
      continue
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


def _comparison(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Charts with the curves of all runs, and the keys in which their configurations differ."""
  charts = []
  runs: list[RunResults] = [one['results'] for one in contents]
  for title, label, name in (('Evaluation loss', 'loss', 'loss'), ('Top-1 accuracy', 'top-1', 'top1')):
    series = [Series(run.name, *run.curve(run.eval_split, name), color=i) for i, run in enumerate(runs)]
    charts.append((title, line_chart(series, 'epoch', label, percent=name == 'top1')))
  values = {key: [one['configuration'][key] for one in contents] for key in contents[0]['configuration']}
  differences = [(key, each) for key, each in values.items() if len(set(each)) > 1]
  return {'charts': charts, 'differences': differences}


def evaluation_section(results: RunResults) -> dict[str, Any] | None:
  """Computes what the page shows of a run whose data are available; returns None without them."""
  predictions, sources = results.predictions, results.sources
  if predictions is None or sources is None:
    return None
  network, names, count = results.network, results.network.readable_names, len(predictions.labels)
  rng = np.random.default_rng(0)
  panel = np.sort(rng.choice(count, min(_PANEL, count), replace=False))
  wrong = np.nonzero(~predictions.hits[:, 0])[0]
  mistakes = wrong[np.argsort(-predictions.losses[wrong], kind='stable')][:_MISTAKES]
  _, views = results.views(sources[1], predictions.indices[:_STATISTICS_OVER])
  confusion = predictions.confusion(len(names))
  return {
    'images': count,
    'protocol': str(results.protocol),
    'top1': predictions.top_k(1),
    'top5': predictions.top_k(5),
    'loss': predictions.mean_loss(),
    'loss_of_chance': math.log(len(names)),
    'calibration_error': predictions.calibration_error(),
    'panel': _predicted_images(results, predictions, sources[1], panel),
    'mistakes': _predicted_images(results, predictions, sources[1], mistakes),
    **_neighbours(results, *sources, rng),
    'confusion': confusion.tolist() if len(names) <= _FEW_CLASSES else None,
    'confused': [(names[label], names[top1], images) for label, top1, images in most_confused(confusion, 12)],
    'layers': layer_statistics(network.model, network.variables, views),
    'layers_over': len(views),
  }


def _predicted_images(
  results: RunResults, predictions: Predictions, source: Source, rows: np.ndarray
) -> list[dict[str, Any]]:
  """Returns images with their labels and top-5 predictions: (class, probability, is correct)."""
  names = results.network.readable_names
  kept, views = results.views(source, predictions.indices[rows])
  rows = rows[np.isin(predictions.indices[rows], kept)]
  found = []
  for row, view in zip(rows.tolist(), views, strict=True):
    top = (predictions.top_classes[row], predictions.probabilities[row], predictions.hits[row])
    best = [(names[number], float(share), bool(hit)) for number, share, hit in zip(*top, strict=True)]
    label = names[predictions.labels[row]]
    found.append({'image': data_uri(view), 'label': label, 'predictions': best})
  return found


def _neighbours(
  results: RunResults, train: Source, evaluated: Source, rng: np.random.Generator
) -> dict[str, Any]:
  """Finds the training images whose last hidden activations are nearest to those of evaluated images.

  A row is an image and its neighbours, each (data URI, class).
  """
  network, names = results.network, results.network.readable_names
  hidden = network.spec.named_layers()[:-1]
  layer = [name for name, one in hidden if not isinstance(one, Dropout | Flatten)][-1]
  features, images = [], []
  for source, count in ((evaluated, _QUERIES), (train, _GALLERY)):
    chosen = rng.choice(source.num_examples, min(count, source.num_examples), replace=False)
    kept, views = results.views(source, np.sort(chosen))
    batches = feature_batches(network.model, network.variables, views, [layer])
    features.append(np.concatenate([batch[layer].reshape(len(batch[layer]), -1) for batch in batches]))
    images.append([(view, names[one.label]) for view, one in zip(views, source.read(kept), strict=True)])
  rows = []
  for query, (view, name) in zip(features[0], images[0], strict=True):
    nearest = np.argsort(np.linalg.norm(features[1] - query, axis=1), kind='stable')[:_NEIGHBOURS]
    found = [(data_uri(images[1][one][0]), images[1][one][1]) for one in nearest]
    rows.append(((data_uri(view), name), found))
  return {'neighbours': rows, 'neighbours_layer': layer, 'gallery': len(images[1])}
