"""`alexnet-flax evaluate`: evaluates networks, prints a summary and writes JSON."""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO

import numpy as np

from alexnet_flax.data.bad_images import BadImages
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset, split_names
from alexnet_flax.data.views import Resize
from alexnet_flax.errors import UsageError, one_line, unknown_name
from alexnet_flax.evaluation.adversarial import Attack
from alexnet_flax.evaluation.calibration import HALVES, require_other_images, scale_by, scale_by_halves
from alexnet_flax.evaluation.evaluate import correct_classes, predict_dataset, require_classes
from alexnet_flax.evaluation.imagenet import (
  ALEXNET_ERRORS,
  CORRUPTED,
  SEVERITIES,
  corruption_errors,
  known_set,
)
from alexnet_flax.evaluation.protocols import Protocol, open_evaluated, protocol_of, split_name
from alexnet_flax.evaluation.scores import Predictions, most_confused
from alexnet_flax.files import expanded, write_text
from alexnet_flax.pretrained import PretrainedModel, unnamed

Orientation = Literal['upright', 'stored']
_FEW_CLASSES = 20  # up to which the whole confusion matrix is printed
_SHOWN = 10


def evaluate(
  networks: Sequence[PretrainedModel],
  dataset: str,
  *,
  data_dir: str | None = None,
  protocol: str = '1-crop',
  resize: Resize = 'pil',
  size: int | None = None,
  batch_size: int = 128,
  any_count: bool = False,
  orientation: Orientation | None = None,
  calibrate: str | None = None,
  bad: BadImages | None = None,
  attacks: Sequence[Attack] = (),
  quiet: bool = False,
) -> dict[str, Any]:
  """Evaluates networks, averaging the predictions of several; prints a summary and returns JSON values.

  Args:
    networks: One or more networks.
    dataset: NAME[:SPLIT] in TFDS's notation; `imagenet2012_corrupted` alone means all of ImageNet-C.
    data_dir: The folder of the data sets.
    protocol, resize, size: See `protocols.protocol_of`.
    batch_size: Images per batch.
    any_count: Accept a published data set that does not have all of its images.
    orientation: Whether images are turned as their metadata say; None leaves those of TFDS's own sets as they
      are stored, as published figures do, and turns all others.
    calibrate: The split that a temperature is fitted on, or NAME:SPLIT, or 'halves': each half of the images
      is scaled by the temperature of the other. Loss and calibration error are given before and after.
    bad: Handles images that cannot be decoded; skipped ones are not counted. An error if None.
    attacks: Instead of on the images themselves, evaluate on adversarial images of each of these.
    quiet: Print to the standard error.

  Raises:
    UsageError: The data set or the protocol does not fit the networks, the data set is missing, or a
      temperature cannot be fitted, or would be fitted on images that are evaluated.
  """
  out = sys.stderr if quiet else sys.stdout
  name, _ = split_name(dataset)
  known, allowed = known_set(name), None
  if known and known.restricted:  # to the classes of the whole set, even if a part of it is evaluated
    whole = open_evaluated(f'{name}:{known.split}', data_dir, any_count)
    allowed = tuple(sorted({label for classes in correct_classes(whole) for label in classes}))
  chosen, bad = protocol_of(networks, protocol, resize, size, allowed), bad or BadImages()
  chosen = chosen.with_views(turn=orientation == 'upright')
  crops = len(set(chosen.views))
  refusals = {
    f'--protocol={protocol}: an attack is on one crop': chosen.view.ten_crop,
    'the networks see different crops: an attack is on one; evaluate one at a time': crops > 1,
    f'{name} is many data sets: attack a part of it, such as {name}/fog_3': name == CORRUPTED,
    '--calibrate: adversarial images are not calibrated; leave it out': calibrate is not None,
  }
  if attacks and any(refusals.values()):
    raise UsageError(next(reason for reason, applies in refusals.items() if applies))
  if known and known.is_cropped:
    views = (dataclasses.replace(view, resize_side=view.image_size) for view in chosen.views)
    chosen = dataclasses.replace(chosen, views=tuple(views))
  if name == CORRUPTED:
    if calibrate is not None:
      raise UsageError(f'--calibrate is for one data set; name a part of this one, such as {name}/fog_3')
    return _evaluate_corrupted(networks, data_dir, chosen, batch_size, any_count, bad, out)
  source = open_evaluated(dataset, data_dir, any_count)
  if orientation is None:
    chosen = chosen.with_views(turn=not source.is_published)
  if attacks:
    return _evaluate_attacked(networks, source, chosen, attacks, batch_size, bad, out)
  predict = functools.partial(
    predict_dataset, networks, protocol=chosen, batch_size=batch_size, keep_all=calibrate is not None
  )
  fit_on = None
  if calibrate not in (None, HALVES):
    other = re.match(r'[^\[]+:', calibrate)  # a slice, test[:50%], has its colon in brackets
    splits = split_names(name, data_dir)
    if not other and '[' not in calibrate and calibrate not in splits:
      raise unknown_name('--calibrate', calibrate, (*splits, HALVES))
    fit_on = open_evaluated(calibrate, data_dir) if other else open_dataset(name, calibrate, data_dir)
    require_other_images(fit_on, source)
    for network in networks:
      require_classes(network, fit_on)
  predictions = predict(source, bad=bad)
  confusion = predictions.confusion(len(networks[0].class_names))
  results = _results(networks, source, chosen, predictions, confusion, bad.skipped)
  try:
    if fit_on is not None:
      fitted = predict(fit_on, bad=dataclasses.replace(bad, reasons={}))
      results['temperature_scaling'] = scale_by(fitted, fit_on.name, predictions)
    elif calibrate is not None:
      results['temperature_scaling'] = scale_by_halves(predictions, source.name)
  except UsageError as error:  # the evaluation itself is not lost
    results['temperature_scaling'] = {'error': str(error)}
  is_named = lambda network: network.class_names != unnamed(len(network.class_names))  # noqa: E731
  named = next(filter(is_named, networks), networks[0])
  print(_table(results, chosen, confusion, named.readable_names), bad.summary(), sep='\n', file=out)
  return results


def write_json(path: str, results: dict[str, Any]) -> None:
  """Writes results to a file, or to the standard output if the path is '-'.

  Raises:
    UsageError: The path cannot be written.
  """
  text = json.dumps(results, allow_nan=False) + '\n'
  if path == '-':
    sys.stdout.write(text)
    return
  try:
    write_text(expanded(path), text)
  except OSError as error:
    raise UsageError(f'cannot write --json={path}: {error.strerror}') from None


def _evaluate_corrupted(
  networks: Sequence[PretrainedModel],
  data_dir: str | None,
  protocol: Protocol,
  batch_size: int,
  any_count: bool,
  bad: BadImages,
  out: TextIO,
) -> dict[str, Any]:
  sources = {
    name: [open_evaluated(f'{CORRUPTED}/{name}_{severity}', data_dir, any_count) for severity in SEVERITIES]
    for name in ALEXNET_ERRORS
  }
  errors: dict[str, list[float]] = {}
  columns = "top-1 error % by severity, mean, relative to AlexNet's published error"
  print(f'{CORRUPTED}, {protocol}: {columns}', file=out)
  for name, severities in sources.items():
    predictions = [
      predict_dataset(networks, one, protocol, batch_size=batch_size, bad=bad) for one in severities
    ]
    errors[name] = [1 - one.top_k(1).value for one in predictions]
    mean = float(np.mean(errors[name]))
    each = ' '.join(f'{100 * error:6.2f}' for error in errors[name])
    relative = 100 * mean / (ALEXNET_ERRORS[name] / 100)
    print(f'  {name:18} {each}  {100 * mean:6.2f}  {relative:7.2f}', file=out)
  means = corruption_errors(errors)
  print(f'mean error {100 * means["error"]:.2f} %, mCE {100 * means["mCE"]:.2f} %', file=out)
  return {'dataset': CORRUPTED, **_conditions(networks, protocol), 'errors': errors, **means}


def _evaluate_attacked(
  networks: Sequence[PretrainedModel],
  source: Source,
  protocol: Protocol,
  attacks: Sequence[Attack],
  batch_size: int,
  bad: BadImages,
  out: TextIO,
) -> dict[str, Any]:
  conditions, rows = _conditions(networks, protocol), []
  print(f'{source.name}, predicted by {_names(conditions)}\n{protocol}\n{attacks[0]}\n', file=out)
  five = len(networks[0].class_names) > 5
  columns = f'epsilon      top-1     95 % interval {"     top-5" if five else ""}      loss'
  print(columns, file=out, flush=True)
  for attack in attacks:
    found = predict_dataset(networks, source, protocol, batch_size=batch_size, bad=bad, attack=attack)
    top1, top5, loss = found.top_k(1), found.top_k(5), found.mean_loss()
    shown = f'{255 * attack.epsilon:g}/255' if attack.norm == 'linf' else f'{attack.epsilon:g}'
    value, low, high, both = (100 * x for x in (*top1, top5.value))
    line = f'{shown:9} {value:7.2f} %  {low:6.2f} ... {high:6.2f}' + f'  {both:7.2f} %' * five
    print(f'{line}  {loss.value:8.4f}', file=out, flush=True)
    figures = {'top1': top1._asdict(), 'top5': top5._asdict(), 'loss': loss._asdict()}
    steps = {'steps': attack.steps if attack.method == 'pgd' else 1}
    rows.append({**dataclasses.asdict(attack), **steps, 'images': len(found.labels), **figures})
  print(bad.summary(), file=out)
  return {'dataset': source.name, **conditions, 'attacks': rows}


def _conditions(networks: Sequence[PretrainedModel], protocol: Protocol) -> dict[str, Any]:
  view, sides = protocol.view, [(view.image_size, view.resize_side) for view in protocol.views]
  crop_side, short_side = sides[0] if len(set(sides)) == 1 else (None, None)  # networks then have their own
  return {
    'networks': [
      {
        'source': pathlib.PurePath(network.source).name,
        'variant': network.spec.name,
        **({} if crop_side else {'crop_side': one, 'short_side': other}),
      }
      for network, (one, other) in zip(networks, sides, strict=True)
    ],
    'protocol': {
      'crops': 10 if view.ten_crop else 1,
      'crop_side': crop_side,
      'short_side': short_side,
      'resize': view.resize,
      'orientation': 'upright' if view.turn else 'stored',
      'allowed_classes': None if protocol.allowed is None else len(protocol.allowed),
    },
  }


def _results(
  networks: Sequence[PretrainedModel],
  source: Source,
  protocol: Protocol,
  predictions: Predictions,
  confusion: np.ndarray,
  skipped: int,
) -> dict[str, Any]:
  names, counts = networks[0].class_names, confusion.sum(1)
  return {
    'dataset': source.name,
    **_conditions(networks, protocol),
    'images': len(predictions.labels),
    'images_without_label': source.num_examples - len(predictions.labels) - skipped,
    'images_skipped': skipped,
    'top1': predictions.top_k(1)._asdict(),
    'top5': predictions.top_k(5)._asdict(),
    'loss': predictions.mean_loss()._asdict(),
    'calibration_error': predictions.calibration_error(),
    'calibration_bins': predictions.calibration_bins(),
    'classes': list(names),
    'per_class': [
      {'class': names[i], 'images': int(counts[i]), 'top1': float(confusion[i, i] / counts[i])}
      for i in np.nonzero(counts)[0]
    ],
    'confusion': [
      [row, column, int(confusion[row, column])] for row, column in np.argwhere(confusion).tolist()
    ],
  }


def _names(results: dict[str, Any]) -> str:
  return ' and '.join(one_line(f'{one["source"]} ({one["variant"]})') for one in results['networks'])


def _table(results: dict[str, Any], protocol: Protocol, confusion: np.ndarray, names: Sequence[str]) -> str:
  networks = _names(results)
  names = [*map(one_line, names)]
  top1, top5 = ([100 * x for x in results[name].values()] for name in ('top1', 'top5'))
  loss, low, high = results['loss'].values()
  lines = [
    f'{results["dataset"]}, {results["images"]:,} images, predicted by {networks}',
    f'{protocol}\n',
    '                          95 % interval',
    f'top-1        {top1[0]:7.2f} %   {top1[1]:.2f} ... {top1[2]:.2f}',
    *([f'top-5        {top5[0]:7.2f} %   {top5[1]:.2f} ... {top5[2]:.2f}'] if len(names) > 5 else []),
    f'loss         {loss:7.4f}     {low:.4f} ... {high:.4f}',
    f'calibration  {100 * results["calibration_error"]:7.2f} %   expected error, 15 bins',
  ]
  scaling = results.get('temperature_scaling', {})
  if 'loss' in scaling:
    loss, low, high = scaling['loss'].values()
    temperatures = ' and '.join(f'{one:.4f}' for one in scaling['temperatures'])
    lines += [
      f'\nat temperature {temperatures}, fitted on {scaling["images"]:,} images, {scaling["fitted_on"]}',
      f'loss         {loss:7.4f}     {low:.4f} ... {high:.4f}',
      f'calibration  {100 * scaling["calibration_error"]:7.2f} %',
    ]
  lines.append('')
  if len(names) <= _FEW_CLASSES:
    return '\n'.join(lines + _confusion_table(confusion, names))
  counts = confusion.sum(1)
  present = np.nonzero(counts)[0]
  accuracy = np.diag(confusion)[present] / counts[present]
  order = present[np.argsort(accuracy, kind='stable')]
  for title, classes in (('worst classes', order[:_SHOWN]), ('best classes', order[::-1][:_SHOWN])):
    lines.append(title)
    lines += [f'  {confusion[i, i] / counts[i]:7.2%} of {counts[i]:5,}  {names[i]}' for i in classes]
  lines.append('most frequent errors')
  for label, predicted, images in most_confused(confusion, _SHOWN):
    lines.append(f'  {images:5,}  {names[label]} predicted as {names[predicted]}')
  return '\n'.join(lines)


def _confusion_table(confusion: np.ndarray, names: Sequence[str]) -> list[str]:
  """Rows are labels, columns predictions."""
  width = max(len(f'{confusion.max():,}'), 4)
  label = max(max(map(len, names)), 5)
  numbers = ' '.join(f'{column:>{width}}' for column in range(len(names)))
  lines = [f'{"":>3} {"":<{label}}    top-1  predicted {numbers}']
  for row, counts in enumerate(confusion):
    if total := counts.sum():
      cells = ' '.join(f'{count or "·":>{width}}' for count in counts.tolist())
      lines.append(f'{row:>3} {names[row]:<{label}}  {counts[row] / total:7.2%}            {cells}')
  return lines
