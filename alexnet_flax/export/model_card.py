"""Model cards: what a weights file holds, how it was trained, and how well it scores."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alexnet_flax.errors import UsageError, one_line
from alexnet_flax.files import public, write_text
from alexnet_flax.pretrained import PretrainedModel, find_run, run_config
from alexnet_flax.training.logger import read_metrics
from alexnet_flax.training.workdir import read_environment, read_history

if TYPE_CHECKING:
  from alexnet_flax.config import DataConfig


def write_card(path: pathlib.Path, files: Sequence[pathlib.Path], network: PretrainedModel) -> None:
  """Writes a model card in Markdown for the files that hold a network."""
  try:
    write_text(path, card(path.name.removesuffix('.md'), files, network))
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror}') from None


def card(title: str, files: Sequence[pathlib.Path], network: PretrainedModel) -> str:
  """Returns a model card in Markdown for the files that hold a network."""
  spec, names = network.spec, network.readable_names
  pre = spec.preprocessing
  short = round(spec.image_size / pre.center_crop_share)
  shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
  lines = [
    f'# {_text(title)}',
    '',
    f'An AlexNet, in {" and ".join(_code(file.name) for file in files)}.',
    '',
    '| | |',
    '|---|---|',
    f'| variant | {_code(spec.name)}: {_text(spec.source)} |',
    f'| parameters | {network.num_parameters:,} |',
    f'| classes | {len(names):,}: {_text(shown)} |',
    f'| image | RGB, short side to {short} (bilinear, antialiased), central square of {spec.image_size} |',
    f'| preprocessing | (pixel * {_number(pre.scale)} - mean) / std, in the order {pre.channel_order};'
    f' mean {_numbers(pre.mean)}, std {_numbers(pre.std)} |',
    *_origin(network),
  ]
  return '\n'.join(lines) + '\n'


def last_evaluation(network: PretrainedModel) -> tuple['DataConfig | None', list[dict[str, Any]]]:
  """Returns a run's data, and the lines with its last top-1 and top-5 up to the network's step."""
  run = find_run(network.source)
  if run is None:
    return None, []
  metrics = [line for line in read_metrics(run[0]) if line['step'] <= (network.step or 0)]
  evaluated = [line for line in metrics if line['split'] != 'train' and line['name'] in ('top1', 'top5')]
  last = [line for line in evaluated if line['step'] == evaluated[-1]['step']]
  return run_config(run[0]).data, last


def _origin(network: PretrainedModel) -> list[str]:
  """Training data, protocol and accuracy, if known."""
  (data, last), run = last_evaluation(network), find_run(network.source)
  if run is None or data is None:
    return [
      f'| weights from | {_text(public(network.source))} |',
      '| accuracy | not measured by this program |',
    ]
  folder, step = run[0], network.step or 0
  environment = read_environment(folder)
  crops = 'ten crops' if data.eval_view.ten_crop else 'one central crop'
  accuracy = ', '.join(f'{line["name"]} {line["value"]:.2%}'.replace('%', ' %') for line in last)
  history = [line for line in read_history(folder) if line['step'] < step]
  return [
    f'| trained on | {_code(data.dataset)}, split {_code(data.train_split)}, {step:,} steps of'
    f' {data.batch_size} |',
    f'| protocol | {_code(data.dataset)}, split {_code(data.eval_split)}, {crops}, resized bilinearly'
    f' {"with" if data.eval_view.resize == "pil" else "without"} antialiasing |',
    f'| accuracy | {accuracy}, over {last[0]["images"]:,} images at step {last[0]["step"]:,} |'
    if last
    else '| accuracy | not measured |',
    *(f'| changed after step {line["step"]:,} | {_changes(line["changes"])} |' for line in history),
    *(f'| {key} | {_code(environment[key])} |' for key in ('command', 'commit') if environment.get(key)),
  ]


def _changes(changes: Mapping[str, Sequence[Any]]) -> str:
  shown = ((_code(key), *(_code(json.dumps(value)) for value in pair)) for key, pair in changes.items())
  return ', '.join(f'{key} from {was} to {now}' for key, was, now in shown)


def _text(text: str) -> str:
  """Text for a cell of a Markdown table, of which nothing is markup, HTML or a control character."""
  return re.sub(r'([\\`*_{}\[\]()<>#|~&!])', r'\\\1', one_line(text))


def _code(text: str) -> str:
  """Text for a code span in such a cell."""
  return '`' + one_line(text).replace('`', "'").replace('|', r'\|') + '`'


def _number(value: float) -> str:
  return '1/255' if np.isclose(value, 1 / 255) else f'{value:g}'


def _numbers(values: Sequence[float]) -> str:
  return '(' + ', '.join(f'{value:g}' for value in values) + ')'
