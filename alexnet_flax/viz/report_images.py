"""The part of a report that needs the data: predictions, neighbours, confusion matrix, layer statistics."""

import dataclasses
from typing import NamedTuple

import numpy as np

from alexnet_flax.data.source import Source
from alexnet_flax.evaluation.scores import Estimate, Predictions, most_confused
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.inference.layer_stats import LayerStatistics, layer_statistics
from alexnet_flax.models.spec import Dropout, Flatten
from alexnet_flax.viz.figures import data_uri
from alexnet_flax.viz.report_run import RunResults, Sources

_PANEL = 8  # images, as in figure 4 of Krizhevsky et al. 2012
_MISTAKES = 8
_QUERIES, _NEIGHBOURS, _GALLERY = 5, 6, 2000
_FEW_CLASSES = 30  # up to which the whole confusion matrix is shown
_STATISTICS_OVER = 64


class PredictedImage(NamedTuple):
  """An image, as a data URI, with its label and top-5 predictions: (class, probability, is correct)."""

  image: str
  label: str
  predictions: list[tuple[str, float, bool]]


class NeighbourRow(NamedTuple):
  """An image with its nearest neighbours, each (data URI, class)."""

  query: tuple[str, str]
  neighbours: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
  """What a report shows of a run if its data are available."""

  images: int
  protocol: str
  top1: Estimate
  top5: Estimate
  loss: Estimate
  calibration_error: float
  panel: list[PredictedImage]
  mistakes: list[PredictedImage]
  neighbours: list[NeighbourRow]
  neighbours_layer: str
  gallery: int
  confusion: list[list[int]] | None
  confused: list[tuple[str, str, int]]
  layers: list[LayerStatistics]
  layers_over: int


def evaluation_section(results: RunResults) -> EvaluationSection | None:
  """Computes the section; returns None without the data."""
  predictions, sources = results.predictions, results.sources
  if predictions is None or sources is None:
    return None
  network, names, count = results.network, results.network.readable_names, len(predictions.labels)
  rng = np.random.default_rng(0)
  panel = np.sort(rng.choice(count, min(_PANEL, count), replace=False))
  wrong = np.nonzero(~predictions.hits[:, 0])[0]
  mistakes = wrong[np.argsort(-predictions.losses[wrong], kind='stable')][:_MISTAKES]
  _, views = results.views(sources.evaluated, predictions.indices[:_STATISTICS_OVER])
  confusion = predictions.confusion(len(names))
  rows, layer, gallery = _neighbours(results, sources, rng)
  return EvaluationSection(
    images=count,
    protocol=str(results.protocol),
    top1=predictions.top_k(1),
    top5=predictions.top_k(5),
    loss=predictions.mean_loss(),
    calibration_error=predictions.calibration_error(),
    panel=_predicted_images(results, predictions, sources.evaluated, panel),
    mistakes=_predicted_images(results, predictions, sources.evaluated, mistakes),
    neighbours=rows,
    neighbours_layer=layer,
    gallery=gallery,
    confusion=confusion.tolist() if len(names) <= _FEW_CLASSES else None,
    confused=[(names[label], names[top1], images) for label, top1, images in most_confused(confusion, 12)],
    layers=layer_statistics(network.model, network.variables, views),
    layers_over=len(views),
  )


def _predicted_images(
  results: RunResults, predictions: Predictions, source: Source, rows: np.ndarray
) -> list[PredictedImage]:
  """Returns the images of some rows of the predictions."""
  names = results.network.readable_names
  _, views = results.views(source, predictions.indices[rows])
  found = []
  for row, view in zip(rows.tolist(), views, strict=True):
    top = (predictions.top_classes[row], predictions.probabilities[row], predictions.hits[row])
    best = [(names[number], float(share), bool(hit)) for number, share, hit in zip(*top, strict=True)]
    found.append(PredictedImage(data_uri(view), names[predictions.labels[row]], best))
  return found


def _neighbours(
  results: RunResults, sources: Sources, rng: np.random.Generator
) -> tuple[list[NeighbourRow], str, int]:
  """Finds the training images whose last hidden activations are nearest to those of evaluated images."""
  network, names = results.network, results.network.readable_names
  hidden = network.spec.named_layers()[:-1]
  layer = [name for name, one in hidden if not isinstance(one, Dropout | Flatten)][-1]
  features, images = [], []
  for source, count in ((sources.evaluated, _QUERIES), (sources.train, _GALLERY)):
    chosen = rng.choice(source.num_examples, min(count, source.num_examples), replace=False)
    kept, views = results.views(source, np.sort(chosen))
    batches = feature_batches(network.model, network.variables, views, [layer])
    features.append(np.concatenate([batch[layer].reshape(len(batch[layer]), -1) for batch in batches]))
    images.append([(view, names[one.label]) for view, one in zip(views, source.read(kept), strict=True)])
  rows = []
  for query, (view, name) in zip(features[0], images[0], strict=True):
    nearest = np.argsort(np.linalg.norm(features[1] - query, axis=1), kind='stable')[:_NEIGHBOURS]
    found = [(data_uri(images[1][one][0]), images[1][one][1]) for one in nearest]
    rows.append(NeighbourRow((data_uri(view), name), found))
  return rows, layer, len(images[1])
