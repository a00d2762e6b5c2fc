"""`alexnet-flax evaluate`."""

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from alexnet_flax.cli.options import (
  NETWORK,
  add_data_dir,
  add_figure,
  add_network,
  check_batch_size,
  figure_file,
  network_options,
)
from alexnet_flax.errors import UsageError

if TYPE_CHECKING:
  from alexnet_flax.evaluation.adversarial import Attack

HELP = 'score trained networks on a data set'
DESCRIPTION = (
  'Accuracy with 95 % intervals, loss, calibration, per class, confusion. The probabilities'
  ' of several networks are averaged. The data set imagenet2012_corrupted is the whole of ImageNet-C.'
)


# Bounds of the change, for pixels in 0 ... 1; l2 is of all values of an image together.
_EPSILONS = {'linf': '0,1/255,2/255,4/255,8/255', 'l2': '0,0.25,0.5,1,2'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('networks', metavar='NETWORK', nargs='*', help=f'each {NETWORK}')
  parser.add_argument('--weights', metavar='NETWORK', nargs='+', default=[], help='the same')
  add_network(parser)
  parser.add_argument('--dataset', metavar='NAME[:SPLIT]', help="(default: the first run's own)")
  add_data_dir(parser)
  parser.add_argument('--protocol', default='1-crop', help='1-crop (default) or ten-crop')
  parser.add_argument('--resize', choices=['pil', 'tf'], default='pil', help='(default: pil, antialiased)')
  parser.add_argument(
    '--orientation',
    choices=['upright', 'stored'],
    help="turn images as their metadata say (default), or not (default for TFDS's own sets, as published)",
  )
  parser.add_argument('--size', type=int, help="side of the crops, such as 227 (default: the network's own)")
  parser.add_argument(
    '--calibrate',
    metavar='SPLIT',
    help='fit a temperature on another split or DATASET:SPLIT; or halves: on the other half of the images',
  )
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--attack', choices=['fgsm', 'pgd'], help='evaluate on adversarial images instead')
  parser.add_argument('--norm', choices=['linf', 'l2'], help="of the attack's change (default: linf)")
  parser.add_argument(
    '--epsilons', metavar='E,...', help=f'its bounds, for values in 0 ... 1 (default: {_EPSILONS["linf"]})'
  )
  parser.add_argument('--steps', type=int, help='of pgd (default: 20)')
  parser.add_argument('--on_bad_image', choices=['error', 'skip'], help="(default: error; or the run's own)")
  parser.add_argument('--any_count', action='store_true', help='score a published set that is not whole')
  parser.add_argument('--json', metavar='FILE', help='file for all figures; - is the standard output')
  add_figure(parser, 'a reliability diagram, or accuracy by epsilon under --attack')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.data.bad_images import BadImages
  from alexnet_flax.evaluation.imagenet import CORRUPTED
  from alexnet_flax.evaluation.summary import evaluate, write_json
  from alexnet_flax.files import check_writable, expanded
  from alexnet_flax.pretrained import (
    PretrainedModel,
    find_run,
    is_network,
    load_pretrained,
    run_config,
    run_data,
    seed_runs,
  )
  from alexnet_flax.weights import open_weights

  sources = [run for one in [*arguments.networks, *arguments.weights] for run in seed_runs(one) or [one]]
  if not sources:
    raise UsageError("name what to evaluate: a run's folder, or a weights file with --variant NAME")
  check_batch_size(arguments)
  if arguments.json not in (None, '-'):
    check_writable(expanded(arguments.json))
  figure = figure_file(arguments)
  attacks = _attacks(arguments)
  say = functools.partial(print, file=sys.stderr)
  bad = BadImages(arguments.on_bad_image or 'error', say, '--on_bad_image=skip')
  dataset = arguments.dataset
  if dataset is None:
    run = next(filter(find_run, sources), None)
    if absent := next(
      (one for one in sources if not (is_network(one) or os.path.exists(expanded(one)))), None
    ):
      raise UsageError(f'cannot read {absent}: there is no such network')
    if run is None:
      raise UsageError('weights do not say what they were trained on; give --dataset NAME[:SPLIT]')
    data = run_config(run).data
    dataset = f'{data.dataset}:{data.eval_split}'
    bad.policy, bad.max_pixels = arguments.on_bad_image or data.on_bad_image, data.max_pixels
  if figure and dataset == CORRUPTED:
    raise UsageError(f'--figure is for one data set; name a part of this one, such as {dataset}/fog_3')
  for one in filter(find_run, sources):
    if run_config(one).data.corruption == 'shuffled_pixels':
      advice = f'its own evaluations are in {one}/metrics.jsonl'
      raise UsageError(f'{one} was trained on shuffled pixels, and these images are not; {advice}')
  options = network_options(arguments)

  def load(source: str) -> PretrainedModel:
    if len(sources) == 1:
      return load_pretrained(source, **options)
    if find_run(source):
      return load_pretrained(source)
    file = open_weights(source)  # of several, the options are for those that do not describe themselves
    return load_pretrained(file, **({} if file.spec else options))

  networks = [load(one) for one in sources]
  run = next(filter(find_run, sources), None)
  if run is not None and dataset.partition(':')[0] == run_config(run).data.dataset:
    arguments.data_dir = run_data(run, arguments.data_dir).data_dir
  names = ('data_dir', 'protocol', 'resize', 'size', 'batch_size', 'any_count', 'orientation', 'calibrate')
  options = {name: getattr(arguments, name) for name in names}
  figures = evaluate(networks, dataset, **options, bad=bad, attacks=attacks, quiet=arguments.json == '-')
  if arguments.json is not None:
    write_json(arguments.json, figures)
  if figure:
    from alexnet_flax.viz.perception import draw_evaluation

    draw_evaluation(figures, figure)
  if error := figures.get('temperature_scaling', {}).get('error'):
    raise UsageError(error)


def _attacks(arguments: argparse.Namespace) -> 'list[Attack]':
  """Returns the attacks of the options, one for each epsilon; none without `--attack`."""
  from alexnet_flax.evaluation.adversarial import Attack

  method, steps = arguments.attack, arguments.steps
  norm: Any = arguments.norm or 'linf'
  if method is None and (arguments.norm, arguments.epsilons, steps) != (None, None, None):
    raise UsageError('--norm, --epsilons and --steps are for --attack=fgsm or pgd')
  if method == 'fgsm' and steps is not None:
    raise UsageError('--steps is for --attack=pgd; fgsm is one step')
  attacks = []
  epsilons = _EPSILONS[norm] if arguments.epsilons is None else arguments.epsilons
  for text in epsilons.split(',') if method else ():
    above, _, below = text.partition('/')
    try:
      epsilon = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
      raise UsageError(f'--epsilons: {text!r} is no number; write them as in 0,1/255,0.03') from None
    attacks.append(Attack(method, norm, epsilon, 20 if steps is None else steps))
  return attacks
