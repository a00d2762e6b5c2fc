"""Writes the ledger of published results and draws its figures: `python -m docs.results > docs/results.md`.

Ours come from the files in results/, to which `alexnet-flax reproduce NAME --results results` adds.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.files import read_json
from alexnet_flax.inference.representations import BetweenRuns
from alexnet_flax.reproduction.claims import CLAIMS, Claim
from alexnet_flax.reproduction.figure import draw
from alexnet_flax.reproduction.reproduce import curves_by_seed, read_records, verdict
from alexnet_flax.viz.similarity import draw_between_runs

_HERE = pathlib.Path(__file__).parent
_RESULTS = _HERE.parent / 'results'


class Published(NamedTuple):
  """A published result that nothing here can reproduce yet."""

  what: str
  number: str
  source: str
  missing: str = 'ImageNet and a GPU'


_KRIZHEVSKY = 'Krizhevsky et al. 2012'
_MISHKIN = 'Mishkin, Sergievskiy, Matas, CVIU 2017; ducha-aiki/caffenet-benchmark'
_OSMR = 'osmr/imgclsmob, gluon/README.md'
_SHIFTED = 'ImageNet, its weights and the shifted set; `alexnet-flax evaluate`'
_OTHERS = (
  Published(
    '`ungrouped`, ImageNet, top-1 / top-5 accuracy',
    '61.93 / 83.90 %',
    _OSMR,
    'ImageNet and a GPU; `configs/imagenet_best.py` aims at it, not run',
  ),
  Published('its conversions to PyTorch', '61.50 / 83.36 and 60.26 / 82.53 %', 'osmr/pytorchcv, README'),
  Published(
    "CaffeNet256All (max and average pooling, learned colours, ELU, SPP), its authors' best, top-1 accuracy",
    '61.3 %',
    _MISHKIN,
  ),
  Published('CaffeNet256 with LSUV alone, top-1 accuracy', '56.5 %', _MISHKIN),
  Published("torchvision's channels, dropout after fc6 and fc7", '60.70 / 82.95 %', f'{_OSMR} (AlexNet-b)'),
  Published('BatchNorm without groups', '60.43 / 82.47 %', 'HolmesShuan/AlexNet-BN-Caffemodel-on-ImageNet'),
  Published('`batchnorm_grouped`', '60.01 / 81.89 %', 'cvjena/cnn-models, AlexNet_cvgj'),
  Published("CNTK's AlexNet", '59.89 / 82.25 %', 'CNTK, Examples/Image/Classification/AlexNet'),
  Published('`caffenet`', '57.4 / 80.4 %', 'BVLC/caffe, models/bvlc_reference_caffenet'),
  Published('`caffe`', '57.1 / 80.2 %', 'BVLC/caffe, models/bvlc_alexnet'),
  Published('`torchvision`', '56.522 / 79.066 %', "torchvision's documentation"),
  Published('`torchvision` on ImageNet-V2, top-1 accuracy', '43.97 %', 'published evaluations', _SHIFTED),
  Published('`torchvision` on ImageNet-A, -R, -Sketch', '1.77, 21.77, 10.72 %', 'the same', _SHIFTED),
  Published('`paper`, ten crops, ILSVRC-2012 validation, top-1 / top-5 error', '40.7 / 18.2 %', _KRIZHEVSKY),
  Published('five networks averaged, error', '38.1 / 16.4 %', _KRIZHEVSKY),
  Published('seven, two of them pre-trained, error', '36.7 / 15.4 %', _KRIZHEVSKY),
  Published('`paper`, ILSVRC-2010 test, one crop, error', '39.0 / 18.3 %', _KRIZHEVSKY),
  Published('the same, ten crops, error', '37.5 / 17.0 %', _KRIZHEVSKY),
  Published(
    'without overlapping pooling, with less padding, error',
    '41.06 / 18.51 %',
    "the 2012 program's log, net 147",
  ),
  Published('without any normalisation, error', '42.03 / 19.36 %', "the 2012 program's log, net 148"),
  Published(
    'changes of CaffeNet at 128 pixels, top-1 accuracy: base 47.1; SPP 48.3, PReLU 48.5, Maxout 48.2, RReLU'
    ' 47.8, leaky ReLU 46.9, rotation up to 5 degrees 44.8, several scales 46.2, dropout 0.3 49.7, fc 4096'
    ' 49.7, 10 % wrong labels 44.7; those of `ablation` are in its figure',
    'as listed',
    _MISHKIN,
  ),
  Published(
    'batches of 8K to 32K by LARC, ImageNet',
    'settings alone',
    'NVIDIA/caffe, models/alexnet_bn',
    'ImageNet and many GPUs; `configs/imagenet_lars.py`',
  ),
  Published(
    "pytorch-classification's AlexNet on CIFAR-100, error",
    '56.13 %',
    'bearpaw/pytorch-classification',
    'CIFAR-100',
  ),
  Published(
    'airbench94 on CIFAR-10, no AlexNet, accuracy',
    '94 % in 2.6 s',
    'KellerJordan/cifar10-airbench',
    'another network',
  ),
)
# Why a claim that can be run has not been.
_NOT_RUN = {'13pct': 'some 5 hours of a core', '11pct': 'some 15 hours of a core'}


def _with_unit(value: float, claim: Claim) -> str:
  if claim.unit == 'rank correlation':
    return f'{value:.2f}'
  return f'{value:.2f} times' if claim.unit == 'times' else f'{value:.2%}'.replace('%', ' %')


def _ours(claim: Claim, runs: Sequence[dict[str, Any]]) -> Iterator[str]:
  """Yields the row of a claim that can be run."""
  found = verdict(claim, list(runs))
  published = _with_unit(claim.published, claim)
  if claim.published_changes:
    published = f'{len(claim.published_changes)} changes'
  command = f'`alexnet-flax reproduce {claim.name}`'
  if found is None:
    yield f'| {claim.what} | {published} | - | not run: {_NOT_RUN[claim.name]} | {command} |'
    return
  error = '' if math.isnan(found.standard_error) else f' ± {_with_unit(found.standard_error, claim)}'
  ours = f'{_with_unit(found.mean, claim)}{error}, {found.seeds} seed{"s" if found.seeds > 1 else ""}'
  by = abs(found.mean - claim.published)
  outcome = {
    'reproduced': '**reproduced**',
    'missed': f'missed by {_with_unit(by, claim)}',
    'undecided': 'undecided: more seeds, or longer runs',
  }[found.outcome]
  if claim.unit == 'rank correlation':
    ours = f'rank correlation {ours}'
    outcome = {'reproduced': '**the order agrees**', 'missed': 'no agreement'}.get(found.outcome, outcome)
  yield f'| {claim.what} | {published} | {ours} | {outcome} | {command} |'


def _about(claim: Claim, runs: Sequence[dict[str, Any]]) -> Iterator[str]:
  """Yields the paragraph of a claim: source, departures, runs, figure."""
  if not runs:
    return
  yield f'## {claim.name}\n'
  yield f'Source: {claim.source}. Departures: {claim.departures}.\n'
  if claim.rates:
    chosen = {one['arm']: one['config']['optimizer.learning_rate'] for one in runs}
    rates = ', '.join(f'{rate:g}' for rate in claim.rates)
    best = ', '.join(f'{rate:g} for {arm}' for arm, rate in chosen.items())
    yield f'Of the learning rates {rates} the one with the fewest epochs, by seed 0: {best}.\n'
  if remark := (read_json(_RESULTS / f'{claim.name}.json') or {}).get('remark'):
    yield f'{remark}\n'
  drawn = 'Accuracy that each change gains' if claim.published_changes else 'Errors by epoch'
  yield f'![{drawn}]({_image(claim).relative_to(_HERE)})\n'
  yield '| arm | seed | epochs | training error | test error | hours | commit |'
  yield '|---|---|---|---|---|---|---|'
  for one in runs:
    epoch, train_error, test_error = one['curve'][-1]
    errors = f'{train_error:.2%} | {test_error:.2%}'.replace('%', ' %')
    yield f'| {one["arm"]} | {one["seed"]} | {epoch:g} | {errors} | {one["hours"]:.2f} | {one["commit"]} |'
  machines = {
    f'{one["devices"]}, JAX {one["versions"]["jax"]}, Python {one["versions"]["python"]}' for one in runs
  }
  yield f'\n{"; ".join(sorted(machines))}.\n'


def _beside_pytorch(runs: list[dict[str, Any]]) -> Iterator[str]:
  """Yields the section that compares the first epochs with PyTorch's, if they were run."""
  curves = list(curves_by_seed(_BESIDE, runs).values())
  if len(curves) < 2:
    return
  errors = {
    arm: np.array([[point.test_error for point in one[arm]] for one in curves]) for arm in _BESIDE.arms
  }
  mean = {arm: of_arm.mean(axis=0) for arm, of_arm in errors.items()}
  spread = {arm: of_arm.std(axis=0, ddof=1) / np.sqrt(len(curves)) for arm, of_arm in errors.items()}
  apart = np.abs(mean['alexnet_flax'] - mean['PyTorch'])
  ratio = apart / np.hypot(*spread.values())
  yield '### The first epochs, beside PyTorch\n'
  yield (
    f'`python benchmarks/cifar10_alexnet.py` trains the same recipe in PyTorch, on the same images and this'
    f' machine: test errors, means of {len(curves)} seeds with their standard errors. The means differ by'
    f' {ratio.mean():.1f} standard errors on average, at most {ratio.max():.1f}.\n'
  )
  yield f'![Errors by epoch]({_image(_BESIDE).relative_to(_HERE)})\n'
  yield '| epoch | alexnet_flax | PyTorch | difference | in standard errors |'
  yield '|---|---|---|---|---|'
  for row in range(len(apart)):
    shown = [f'{mean[arm][row]:.2%} ± {spread[arm][row]:.2%}' for arm in _BESIDE.arms]
    cells = [*shown, f'{apart[row]:.2%}', f'{ratio[row]:.1f}']
    yield f'| {row + 1} | {" | ".join(cells)} |'.replace('%', ' %')
  yield ''


def _image(claim: Claim) -> pathlib.Path:
  return _HERE / 'images' / f'{claim.name}.svg'


def _row_of_seeds(record: dict[str, Any] | None) -> Iterator[str]:
  """Yields the row about networks that differ by their seed."""
  if record is None:
    return
  rsa, cka = ([of[layer][0] for layer in of] for of in record['similarity'].values())
  yield (
    f'| how alike {record["runs"]} seeds are, from the first layer to the last | - |'
    f' RSA {rsa[0]:.2f} to {rsa[-1]:.2f}, linear CKA {cka[0]:.2f} to {cka[-1]:.2f} |'
    ' measured: nothing is published of this network |'
    ' `python benchmarks/seeds.py` |'
  )


def _between_seeds(record: dict[str, Any] | None) -> Iterator[str]:
  """Yields the section about networks that differ by their seed, if they were compared."""
  if record is None:
    return
  yield '## seeds\n'
  yield (
    f'How alike are {record["runs"]} networks that differ by their seed alone? `python benchmarks/seeds.py'
    f' RUN RUN RUN`, of runs that `num_seeds` or `reproduce` left: the similarity of each layer,'
    f" mean and standard deviation over the pairs; `{record['variant']}`, {record['images']}. RSA: Spearman's"
    f' correlation of the matrices of correlation distances (Kriegeskorte et al. 2008); linear CKA (Kornblith'
    f' et al. 2019).\n'
  )
  yield f'![Similarity between seeds]({_SEEDS_IMAGE.relative_to(_HERE)})\n'
  rsa, cka = record['similarity'].values()
  yield '| layer | RSA | linear CKA |'
  yield '|---|---|---|'
  for layer in rsa:
    cells = [f'{mean:.3f} ± {deviation:.3f}' for mean, deviation, _ in (rsa[layer], cka[layer])]
    yield f'| {layer} | {" | ".join(cells)} |'
  yield ''


_SEEDS_IMAGE = _HERE / 'images' / 'seeds.svg'
# What benchmarks/cifar10_alexnet.py records.
_BESIDE = dataclasses.replace(
  CLAIMS['cifar10_alexnet'], name='cifar10_alexnet_pytorch', arms={'alexnet_flax': {}, 'PyTorch': {}}
)


def _records(claim: Claim) -> list[dict[str, Any]]:
  return read_records(_RESULTS / f'{claim.name}.json')


def markdown() -> str:
  """Returns the page."""
  runs = {claim.name: _records(claim) for claim in CLAIMS.values()}
  seeds = read_json(_RESULTS / 'seeds.json')
  lines = [
    '# Published results',
    '',
    'What others have published about AlexNets, and what this program gets by the same recipe. A number is',
    'reproduced if ours is better, or worse by at most two standard errors of our seeds (of the images,',
    'for an error of one seed). Two orders agree if their rank correlation is two standard errors above what',
    'one of twenty random orders reaches. This page is written from the files in `results/`:',
    '`alexnet-flax reproduce NAME --results results` adds to them, and `python -m docs.results >',
    'docs/results.md` writes the page. Remarks in them are by hand. A commit with + had changes that were',
    'not committed.',
    '',
    '| what | published | ours | verdict | command |',
    '|---|---|---|---|---|',
    *(row for claim in CLAIMS.values() for row in _ours(claim, runs[claim.name])),
    *_row_of_seeds(seeds),
    '',
    '`alexnet-flax prepare cifar10` fetches the data. A run that was cut off goes on with the same command.',
    '',
    *(line for claim in CLAIMS.values() for line in _about(claim, runs[claim.name])),
    *_beside_pytorch(_records(_BESIDE)),
    *_between_seeds(seeds),
    '## Not tried',
    '',
    '| what | published | source | what is missing here |',
    '|---|---|---|---|',
    *(f'| {one.what} | {one.number} | {one.source} | {one.missing} |' for one in _OTHERS),
    '',
    'Runs of our own recipes, without a published number to compare with, are in [runs.md](runs.md).',
  ]
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  for claim in (*CLAIMS.values(), _BESIDE):
    if runs := _records(claim):
      draw(claim, runs, _image(claim))
  if record := read_json(_RESULTS / 'seeds.json'):
    draw_between_runs(
      {
        measure: {layer: BetweenRuns(*values) for layer, values in found.items()}
        for measure, found in record['similarity'].items()
      },
      _SEEDS_IMAGE,
    )
  print(markdown(), end='')
