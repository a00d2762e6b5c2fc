"""`alexnet-flax compare`: how similar the layers of files of features are, each with each."""

import contextlib
import csv
import io
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.data.images import printable
from alexnet_flax.errors import UsageError, one_line, unknown_name
from alexnet_flax.files import write_json, write_text
from alexnet_flax.inference.feature_files import FeatureFile, read_features, read_layer
from alexnet_flax.inference.representations import (
  DISTANCES,
  bootstrap_interval,
  compare_rdms,
  comparison_of,
  noise_ceiling,
  representation,
  some,
)
from alexnet_flax.pretrained import is_network
from alexnet_flax.weights import open_weights


class Comparison(NamedTuple):
  """The similarity of each of A layers of a file with each of B layers of another."""

  first: FeatureFile
  second: FeatureFile
  first_layers: list[str]
  second_layers: list[str]
  similarity: np.ndarray  # [A, B]
  interval: np.ndarray | None  # [2, A, B], the ends of the 95 % confidence interval over stimuli


class Result(NamedTuple):
  """Comparisons of a first file with others, and what they have in common."""

  measure: str
  distance: str | None  # None for CKA
  bootstrap: int | None  # draws of stimuli for the intervals
  comparisons: list[Comparison]
  ceilings: dict[str, tuple[float, float]]  # lower and upper bounds by layer of the other files; or empty

  def __str__(self) -> str:
    stimuli = self.comparisons[0].first.stimuli
    distance = f' of {self.distance} distances' if self.distance else ''
    return f'{self.measure}{distance}, {stimuli} stimuli'


def _print_note(line: str) -> None:
  print(one_line(f'note: {line}'), file=sys.stderr)


def compare_files(
  paths: Sequence[str],
  measure: str = 'rsa-spearman',
  *,
  distance: str | None = None,
  layers: Sequence[str] = (),
  bootstrap: int | None = None,
  ceiling: bool = False,
  say: Callable[[str], None] = _print_note,
) -> Result:
  """Compares the layers of the first file of features with those of each other file.

  The features of one layer are in memory at a time, and for each layer of two files a vector of N (N - 1) / 2
  numbers, for CKA of N²; with a ceiling, for each layer of all files.

  Args:
    paths: At least two files, as `read_features` reads them. See `match_stimuli` for their rows.
    measure: As for `representation`.
    distance: As for `dissimilarities`, 'correlation' by default; CKA has none.
    layers: The layers to compare, of which each file must have at least one; all if empty.
    bootstrap: The number of draws of stimuli for confidence intervals, for RSA; None for no intervals.
    ceiling: Whether the other files are subjects, whose variation sets a `noise_ceiling` for each layer, for
      RSA; there must be at least two, with the same layers.
    say: Called with a note where stimuli were not matched by the images' content.

  Raises:
    UsageError: A file cannot be read, its stimuli are others, an argument is unknown or does not fit the
      measure, or a layer cannot be compared.
  """
  comparison = comparison_of(measure)
  if measure.startswith('rsa-'):
    distance = distance or DISTANCES[0]
  elif distance or bootstrap is not None or ceiling:
    given = '--distance' if distance else '--ceiling' if ceiling else '--bootstrap'
    raise UsageError(
      f'{given} is for dissimilarities, which {measure} does not compare; take --measure rsa-...'
    )
  if distance not in (None, *DISTANCES):
    raise unknown_name('distance', distance, DISTANCES)
  if bootstrap is not None and bootstrap < 1:
    raise UsageError(f'--bootstrap (={bootstrap}) must be at least 1')
  if len(paths) < 2:
    raise UsageError('name at least two files of features')
  if ceiling and len(paths) < 3:
    raise UsageError('--ceiling needs the files of at least two subjects after the first file')
  files = [_read(path) for path in paths]
  chosen = _choose(files, [*dict.fromkeys(filter(None, map(str.strip, layers)))])
  for number in range(2, len(files) if ceiling else 0):
    if set(chosen[number]) != set(chosen[1]):
      each = (f'{files[one].path} has {", ".join(chosen[one])}' for one in (1, number))
      raise UsageError(
        f'--ceiling: the subjects have different layers: {", ".join(each)}; choose by --layers'
      )
    chosen[number] = chosen[1]  # in one order
  orders = [np.arange(files[0].stimuli), *(match_stimuli(files[0], file, say) for file in files[1:])]

  def vectors(number: int) -> np.ndarray:
    file, found = files[number], []
    for layer in chosen[number]:
      features = read_layer(file, layer)[orders[number]]
      try:
        found.append(representation(features, measure, distance or '', names=files[0].names))
      except UsageError as error:
        raise UsageError(f'{file.path}: {layer}: {error}') from None
    return np.stack(found)

  first, comparisons, subjects = vectors(0), [], list[np.ndarray]()
  for number in range(1, len(files)):
    pair = first, vectors(number)
    interval = bootstrap_interval(*pair, comparison, draws=bootstrap) if bootstrap else None
    similarity = compare_rdms(*pair, comparison)
    both = files[0], files[number], chosen[0], chosen[number]
    comparisons.append(Comparison(*both, similarity, interval))
    if ceiling:
      subjects.append(pair[1])
  by_layer = zip(chosen[1], zip(*subjects, strict=True), strict=False)
  ceilings = {layer: noise_ceiling(np.stack(rdms), comparison) for layer, rdms in by_layer}
  return Result(measure, distance, bootstrap, comparisons, ceilings)


def _read(path: str) -> FeatureFile:
  """Reads a file of features; says what to do with a network, which it may be too."""
  try:
    return read_features(path)
  except UsageError:
    # Files of features end in .h5 as Keras's networks do.
    if not is_network(path) or (path.endswith('.h5') and not _is_of_keras(path)):
      raise
    advice = f'alexnet-flax features IMAGES {path} --layers relu5,fc7 --out FEATURES.h5'
    raise UsageError(f'{path} is a network; write its features first: {advice}') from None


def _is_of_keras(path: str) -> bool:
  with contextlib.suppress(UsageError):
    return any(name.startswith('layers/') for name in open_weights(path).stored.arrays)
  return False


def _choose(files: Sequence[FeatureFile], layers: Sequence[str]) -> list[list[str]]:
  """Returns the layers of each file that are to be compared, in the file's order if all are."""
  known = list(dict.fromkeys(layer for file in files for layer in file.layers))
  for layer in layers:
    if layer not in known:
      raise unknown_name('layer', layer, known)
  chosen = [[layer for layer in layers or file.layers if layer in file.layers] for file in files]
  for file, found in zip(files, chosen, strict=True):
    if not found:
      raise UsageError(
        f'{file.path} has none of the layers {", ".join(layers)}; it has {", ".join(file.layers)}'
      )
  return chosen


def match_stimuli(first: FeatureFile, second: FeatureFile, say: Callable[[str], None]) -> np.ndarray:
  """Returns which row of the second file belongs to each row of the first, int [N].

  Rows are matched by the images' digests; if a file has none, by names, then by names without folders; if it
  has no names either, or all are equal, by their order.

  Args:
    first, second: The files.
    say: Called with a note if digests and names did not do.

  Raises:
    UsageError: The stimuli differ.
  """
  unnamed = [file for file in (second, first) if len(set(file.names)) < 2]
  if first.digests and second.digests:
    keys = first.digests, second.digests
  elif not unnamed:
    keys = first.names, second.names
    bare = [*map(os.path.basename, first.names)], [*map(os.path.basename, second.names)]
    if Counter(keys[0]) != Counter(keys[1]) and Counter(bare[0]) == Counter(bare[1]):
      say(f'the stimuli of {first.path} and {second.path} are matched by their names without folders')
      keys = bare
  elif first.stimuli == second.stimuli:
    silent = unnamed[-1]
    say(
      f'{silent.path} does not name its stimuli: its {silent.stimuli} rows are taken to be in the same order'
    )
    return np.arange(first.stimuli)
  else:
    counts = f'{first.path} has {first.stimuli} rows and {second.path} has {second.stimuli}'
    raise UsageError(f'{counts}; they must be of the same stimuli')
  only = _only(first, second, *keys), _only(second, first, *keys[::-1])
  if any(only):
    raise UsageError(f'the stimuli differ: {"; ".join(filter(None, only))}')
  order = np.empty(first.stimuli, int)
  order[np.argsort(keys[0], kind='stable')] = np.argsort(keys[1], kind='stable')
  return order


def _only(file: FeatureFile, other: FeatureFile, keys: Sequence[str], others: Sequence[str]) -> str:
  """Says which stimuli only one of two files has; '' for none."""
  left, names, found = Counter(others), set(other.names), []
  for number, key in enumerate(keys):
    if left[key] > 0:
      left[key] -= 1
    else:
      name = file.names[number] if file.names else key
      found.append(f'{name} (SHA-256 {key[:8]}...)' if name in names and name != key else name)
  return f'only {file.path} has {some(found)}' if found else ''


def tables(result: Result) -> Iterator[str]:
  """Yields lines: for each comparison a heading and a row for each layer of the first file; the ceilings."""
  yield f'{result}, 95 % intervals of {result.bootstrap} draws' if result.bootstrap else str(result)
  for one in result.comparisons:
    yield f'rows {one.first.path}, columns {one.second.path}'
    cells = [['', *one.second_layers]]
    for row, layer in enumerate(one.first_layers):
      values = [_cell(one, row, column) for column in range(len(one.second_layers))]
      cells.append([layer, *values])
    yield from _aligned(cells)
  if result.ceilings:
    yield f'mean of {len(result.comparisons)} subjects, and their noise ceiling'
    means = np.mean([one.similarity for one in result.comparisons], axis=0)
    table = np.concatenate([means, np.transpose([*result.ceilings.values()])])
    names = [*result.comparisons[0].first_layers, 'lower bound', 'upper bound']
    rows = ([name, *(f'{value:.3f}' for value in row)] for name, row in zip(names, table, strict=True))
    yield from _aligned([['', *result.ceilings], *rows])


def _aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  for name, *values in cells:
    padded = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
    yield '  '.join([name.ljust(widths[0]), *padded])


def _cell(one: Comparison, row: int, column: int) -> str:
  value = f'{one.similarity[row, column]:.3f}'
  if one.interval is None:
    return value
  low, high = one.interval[:, row, column]
  return f'{value} [{low:.3f}, {high:.3f}]'


def write_result(result: Result, path: pathlib.Path) -> None:
  """Writes a result: as .csv, a line for each pair of layers; as .json, matrices and what the files say.

  Raises:
    UsageError: It cannot be written.
  """
  try:
    if path.suffix.lower() == '.json':
      write_json(path, _as_json(result))
    else:
      write_text(path, _as_csv(result))
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None


def _as_json(result: Result) -> dict[str, Any]:
  files = {one.path: one for pair in result.comparisons for one in (pair.first, pair.second)}
  return {
    'measure': result.measure,
    'distance': result.distance,
    'bootstrap': result.bootstrap,
    'ceilings': result.ceilings,
    'files': [
      {'path': printable(one.path), 'stimuli': one.stimuli, 'attributes': one.attributes}
      for one in files.values()
    ],
    'comparisons': [
      {
        'first': printable(one.first.path),
        'second': printable(one.second.path),
        'first_layers': one.first_layers,
        'second_layers': one.second_layers,
        'similarity': one.similarity.tolist(),
        'interval': None if one.interval is None else one.interval.tolist(),
      }
      for one in result.comparisons
    ],
  }


def _as_csv(result: Result) -> str:
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  head = ['first', 'first_layer', 'second', 'second_layer', 'measure', 'distance', 'stimuli', 'similarity']
  writer.writerow([*head, 'low', 'high', 'ceiling_low', 'ceiling_high'])
  for one in result.comparisons:
    for row, column in np.ndindex(*one.similarity.shape):
      ends = ['', ''] if one.interval is None else one.interval[:, row, column].tolist()
      layers = one.first_layers[row], one.second_layers[column]
      places = printable(one.first.path), printable(one.second.path)
      names = [name for pair in zip(places, layers, strict=True) for name in pair]
      values = [result.measure, result.distance or '', one.first.stimuli, float(one.similarity[row, column])]
      writer.writerow([*names, *values, *ends, *result.ceilings.get(layers[1], ('', ''))])
  return buffer.getvalue()
