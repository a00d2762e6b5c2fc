"""`alexnet-flax evaluate`: what is printed of an evaluation, and its JSON."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from alexnet_flax.data.source import Source
from alexnet_flax.errors import UsageError
from alexnet_flax.evaluation.evaluate import answer, right_classes
from alexnet_flax.evaluation.imagenet import (
  ALEXNET_ERRORS,
  CORRUPTED,
  SEVERITIES,
  KnownSet,
  corruption_errors,
  known_set,
)
from alexnet_flax.evaluation.protocols import Protocol, open_evaluated, protocol_of, split_name
from alexnet_flax.evaluation.scores import Answers, Estimate, most_confused
from alexnet_flax.files import write_text
from alexnet_flax.pretrained import PretrainedModel

_FEW_CLASSES = 20  # so many are shown whole
_SHOWN = 10


def evaluate(
  networks: Sequence[PretrainedModel],
  dataset: str,
  *,
  data_dir: str | None = None,
  protocol: str = '1-crop',
  resize: Any = 'pil',
  size: int | None = None,
  batch_size: int = 128,
  any_count: bool = False,
  quiet: bool = False,
) -> dict[str, Any]:
  """Scores networks, averaged if there are several, and prints a table.

  Args:
    networks: one or more.
    dataset: NAME[:SPLIT] in TFDS's notation. `imagenet2012_corrupted` without a configuration is all of
      ImageNet-C.
    data_dir: where data sets lie.
    protocol, resize, size: see `protocols.protocol_of`.
    batch_size: images at a time.
    any_count: score a published set although it does not have all of its images.
    quiet: print to the standard error.

  Returns:
    The figures, for JSON.

  Raises:
    UsageError: the data set or the protocol does not fit the networks, or is not there.
  """
  out = sys.stderr if quiet else sys.stdout
  name, split = split_name(dataset)
  known = known_set(name)
  allowed = None
  if known and known.restricted:  # to those of the whole set, whatever is asked for
    whole = _opened(f'{name}:{known.split}', data_dir, known, any_count)
    allowed = tuple(sorted({one for some in right_classes(whole) for one in some}))
  chosen = protocol_of(networks, protocol, resize, size, allowed)
  if known and known.is_cropped:
    view = dataclasses.replace(chosen.view, resize_side=chosen.view.image_size)
    chosen = dataclasses.replace(chosen, view=view)
  if name == CORRUPTED:
    return _evaluate_corrupted(networks, data_dir, chosen, batch_size, any_count, out)
  source = _opened(dataset, data_dir, known if '[' not in (split or '') else None, any_count)
  answers = answer(networks, source, chosen, batch_size=batch_size)
  figures = _figures(networks, source, chosen, answers)
  print(_table(figures, answers, networks[0].readable_names), file=out)
  return figures


def _opened(dataset: str, data_dir: str | None, known: KnownSet | None, any_count: bool) -> Source:
  """A data set, which has all its images if it is a published one."""
  source = open_evaluated(dataset, data_dir)
  if known and source.num_examples != known.images and not any_count:
    raise UsageError(
      f'{source.name} has {source.num_examples:,} images here, and published figures are of'
      f' {known.images:,}; prepare it whole, or give --any_count'
    )
  return source


def check_writable(path: str) -> None:
  """Raises UsageError if a file cannot be written, before hours are spent on what it is to hold."""
  place = pathlib.Path(path).expanduser()
  if path != '-' and (place.is_dir() or not os.access(place if place.exists() else place.parent, os.W_OK)):
    raise UsageError(f'cannot write --json={path}: {"a folder" if place.is_dir() else "not writable"}')


def write_json(path: str, figures: dict[str, Any]) -> None:
  """Writes an evaluation; '-' is the standard output.

  Raises:
    UsageError: the path cannot be written.
  """
  text = json.dumps(figures, allow_nan=False) + '\n'
  if path == '-':
    sys.stdout.write(text)
    return
  try:
    place = pathlib.Path(path).expanduser()
    if place.exists() and not place.is_file():
      place.write_text(text)  # a device or a pipe cannot be replaced
    else:
      write_text(place, text)
  except OSError as error:
    raise UsageError(f'cannot write --json={path}: {error.strerror}') from None


def _evaluate_corrupted(
  networks: Sequence[PretrainedModel],
  data_dir: str | None,
  protocol: Protocol,
  batch_size: int,
  any_count: bool,
  out: TextIO,
) -> dict[str, Any]:
  """ImageNet-C: 15 corruptions in five severities each."""
  sources = {
    name: [
      _opened(f'{CORRUPTED}/{name}_{severity}', data_dir, known_set(CORRUPTED), any_count)
      for severity in SEVERITIES
    ]
    for name in ALEXNET_ERRORS
  }
  errors: dict[str, list[float]] = {}
  print(
    f"{CORRUPTED}, {protocol}: top-1 error %, by severity, their mean, and over AlexNet's published", file=out
  )
  for name, of_severities in sources.items():
    answered = [answer(networks, source, protocol, batch_size=batch_size) for source in of_severities]
    errors[name] = [1 - answers.top(1).value for answers in answered]
    mean = float(np.mean(errors[name]))
    each = ' '.join(f'{100 * error:6.2f}' for error in errors[name])
    print(
      f'  {name:18} {each}  {100 * mean:6.2f}  {100 * mean / (ALEXNET_ERRORS[name] / 100):7.2f}', file=out
    )
  summary = corruption_errors(errors)
  print(f'mean error {summary["error"]:.2%}, mCE {summary["mCE"]:.2%}'.replace('%', ' %'), file=out)
  return {'dataset': CORRUPTED, **_conditions(networks, protocol), 'errors': errors, **summary}


def _conditions(networks: Sequence[PretrainedModel], protocol: Protocol) -> dict[str, Any]:
  view = protocol.view
  return {
    'networks': [
      {'source': pathlib.PurePath(network.source).name, 'variant': network.spec.name} for network in networks
    ],
    'protocol': {
      'crops': 10 if view.ten_crop else 1,
      'crop_side': view.image_size,
      'short_side': view.resize_side,
      'resize': view.resize,
      'allowed_classes': None if protocol.allowed is None else len(protocol.allowed),
    },
  }


def _figures(
  networks: Sequence[PretrainedModel], source: Source, protocol: Protocol, answers: Answers
) -> dict[str, Any]:
  num_classes = networks[0].model.num_classes or 0
  counts, hits = answers.per_class(num_classes)
  confusion = answers.confusion(num_classes)
  rows, columns = np.nonzero(confusion)
  names = networks[0].class_names
  return {
    'dataset': source.name,
    **_conditions(networks, protocol),
    'images': len(answers.right),
    'images_without_label': source.num_examples - len(answers.right),
    'top1': answers.top(1)._asdict(),
    'top5': answers.top(5)._asdict(),
    'loss': answers.loss()._asdict(),
    'calibration_error': answers.calibration_error(),
    'classes': list(names),
    'per_class': [
      {'class': names[i], 'images': int(counts[i]), 'top1': float(hits[i] / counts[i])}
      for i in np.nonzero(counts)[0]
    ],
    'confusion': [
      [int(row), int(column), int(confusion[row, column])] for row, column in zip(rows, columns, strict=True)
    ],
  }


def _table(figures: dict[str, Any], answers: Answers, names: Sequence[str]) -> str:
  networks = ' and '.join(f'{one["source"]} ({one["variant"]})' for one in figures['networks'])
  protocol = figures['protocol']
  lines = [
    f'{figures["dataset"]}, {figures["images"]:,} images, answered by {networks}',
    f'{protocol["crops"]} crop{"s" if protocol["crops"] > 1 else ""} of {protocol["crop_side"]}, short side'
    f' {protocol["short_side"]}, resized as {protocol["resize"]} does'
    + (f', among {protocol["allowed_classes"]} classes' if protocol['allowed_classes'] else ''),
    '',
    '                          95 % interval',
  ]
  for label, name in (('top-1', 'top1'), ('top-5', 'top5')):
    value, low, high = (100 * x for x in Estimate(**figures[name]))
    lines.append(f'{label:<12} {value:7.2f} %   {low:.2f} ... {high:.2f}')
  value, low, high = Estimate(**figures['loss'])
  lines.append(f'{"loss":<12} {value:7.4f}     {low:.4f} ... {high:.4f}')
  lines.append(f'{"calibration":<12} {100 * figures["calibration_error"]:7.2f} %   expected error, 15 bins')
  confusion = answers.confusion(len(figures['classes']))
  present = np.nonzero(confusion.sum(1))[0]
  lines.append('')
  if len(figures['classes']) <= _FEW_CLASSES:
    lines += _whole_confusion(confusion, names)
  else:
    share = confusion[present, present] / confusion[present].sum(1)
    order = present[np.argsort(share, kind='stable')]
    for title, some in (('worst classes', order[:_SHOWN]), ('best classes', order[::-1][:_SHOWN])):
      lines.append(title)
      lines += [
        f'  {confusion[i, i] / confusion[i].sum():7.2%} of {confusion[i].sum():5,}  {names[i]}' for i in some
      ]
    lines.append('most frequent mistakes')
    for right, taken, images in most_confused(confusion, _SHOWN):
      lines.append(f'  {images:5,}  {names[right]} taken for {names[taken]}')
  return '\n'.join(lines)


def _whole_confusion(confusion: np.ndarray, names: Sequence[str]) -> list[str]:
  """Rows are the right classes, columns the answers."""
  width = max(len(f'{confusion.max():,}'), 4)
  label = max(max(map(len, names)), 5)
  numbers = ' '.join(f'{column:>{width}}' for column in range(len(names)))
  lines = [f'{"":>3} {"":<{label}}    top-1  taken for {numbers}']
  for row, counts in enumerate(confusion):
    if total := counts.sum():
      cells = ' '.join(f'{count or "·":>{width}}' for count in counts.tolist())
      lines.append(f'{row:>3} {names[row]:<{label}}  {counts[row] / total:7.2%}            {cells}')
  return lines
