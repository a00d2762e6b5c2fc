"""What a report shows of one run with its data: answers to images, neighbours, mistakes, layers."""

import dataclasses

import numpy as np

from alexnet_flax.data.source import Source
from alexnet_flax.evaluation.scores import Answers, Estimate, most_confused
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.inference.layer_stats import LayerStatistics, layer_statistics
from alexnet_flax.models.spec import Dropout, Flatten
from alexnet_flax.viz.figures import data_uri
from alexnet_flax.viz.report_run import Sources, Subject

PANEL = 8  # images, as in figure 4 of Krizhevsky et al. 2012
QUERIES, NEIGHBOURS = 5, 6
GALLERY = 2000
_FEW_CLASSES = 30  # so many have a whole confusion matrix
_STATISTICS_OVER = 64
_MISTAKES = 8


@dataclasses.dataclass(frozen=True)
class Guess:
  """An image with the network's five best answers.

  Attributes:
    image: as a data URI.
    label: the right class.
    answers: (class, probability, whether it is right).
  """

  image: str
  label: str
  answers: list[tuple[str, float, bool]]


@dataclasses.dataclass(frozen=True)
class Row:
  """An image and its nearest neighbours, each (image, class)."""

  query: tuple[str, str]
  neighbours: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class ShownImages:
  """What can be shown only where the data are at hand."""

  images: int
  protocol: str
  top1: Estimate
  top5: Estimate
  loss: Estimate
  calibration_error: float
  panel: list[Guess]
  mistakes: list[Guess]
  neighbours: list[Row]
  neighbours_layer: str
  gallery: int
  confusion: list[list[int]] | None
  confused: list[tuple[str, str, int]]
  layers: list[LayerStatistics]
  layers_over: int


def shown_images(subject: Subject) -> ShownImages | None:
  """All of it; None where the data are not at hand."""
  answers, sources = subject.answers, subject.sources
  if answers is None or sources is None:
    return None
  source = sources.evaluated
  names = subject.network.readable_names
  rng = np.random.default_rng(0)
  panel = np.sort(rng.choice(len(answers.right), min(PANEL, len(answers.right)), replace=False))
  wrong = np.nonzero(~answers.hits[:, 0])[0]
  mistakes = wrong[np.argsort(-answers.losses[wrong], kind='stable')][:_MISTAKES]
  _, some = subject.views(source, answers.numbers[:_STATISTICS_OVER])
  confusion = answers.confusion(len(names))
  rows, layer, gallery = _neighbours(subject, sources, rng)
  return ShownImages(
    images=len(answers.right),
    protocol=str(subject.protocol),
    top1=answers.top(1),
    top5=answers.top(5),
    loss=answers.loss(),
    calibration_error=answers.calibration_error(),
    panel=_guesses(subject, answers, source, panel),
    mistakes=_guesses(subject, answers, source, mistakes),
    neighbours=rows,
    neighbours_layer=layer,
    gallery=gallery,
    confusion=confusion.tolist() if len(names) <= _FEW_CLASSES else None,
    confused=[(names[label], names[taken], count) for label, taken, count in most_confused(confusion, 12)],
    layers=layer_statistics(subject.network.model, subject.network.variables, some),
    layers_over=len(some),
  )


def _guesses(subject: Subject, answers: Answers, source: Source, places: np.ndarray) -> list[Guess]:
  """Of the answers at some places."""
  names = subject.network.readable_names
  _, views = subject.views(source, answers.numbers[places])
  return [
    Guess(
      data_uri(view),
      names[answers.labels[place]],
      [
        (names[best], float(probability), bool(hit))
        for best, probability, hit in zip(
          answers.best[place], answers.probabilities[place], answers.hits[place], strict=True
        )
      ],
    )
    for place, view in zip(places.tolist(), views, strict=True)
  ]


def _neighbours(subject: Subject, both: Sources, rng: np.random.Generator) -> tuple[list[Row], str, int]:
  """Evaluated images, and the training images whose last hidden layer is nearest to theirs."""
  network, names = subject.network, subject.network.readable_names
  sources = (both.evaluated, both.train)
  hidden = list(network.spec.named_layers())[:-1]
  layer = [name for name, one in hidden if not isinstance(one, Dropout | Flatten)][-1]
  chosen = [
    np.sort(rng.choice(source.num_examples, min(count, source.num_examples), replace=False))
    for source, count in zip(sources, (QUERIES, GALLERY), strict=True)
  ]
  seen = [subject.views(source, numbers) for source, numbers in zip(sources, chosen, strict=True)]
  views = [some for _, some in seen]
  labels = [
    [example.label for example in source.read(kept)] for source, (kept, _) in zip(sources, seen, strict=True)
  ]
  queries, gallery = (
    np.concatenate(
      [
        part[layer].reshape(len(part[layer]), -1)
        for part in feature_batches(network.model, network.variables, some, [layer])
      ]
    )
    for some in views
  )
  rows = []
  for number, query in enumerate(queries):
    nearest = np.argsort(np.linalg.norm(gallery - query, axis=1), kind='stable')[:NEIGHBOURS]
    rows.append(
      Row(
        (data_uri(views[0][number]), names[labels[0][number]]),
        [(data_uri(views[1][one]), names[labels[1][one]]) for one in nearest],
      )
    )
  return rows, layer, len(gallery)
