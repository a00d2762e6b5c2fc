"""docs/family.md agrees with the specs, and its counts with the literature."""

import pathlib

from alexnet_flax import VARIANTS
from docs.family import differences, markdown, rows
from docs.family_figure import boxes


def test_the_page_is_current():
  page = pathlib.Path('docs/family.md').read_text()
  assert page == markdown(), 'run: python -m docs.family > docs/family.md'


def test_multiply_adds():
  """By hand: conv1 of the paper has 55 * 55 positions and 96 filters; conv2 sees half of 96 channels."""
  costs = {row.name: row.multiply_adds for row in rows(VARIANTS['paper'])}
  assert costs['conv1'] == 55 * 55 * 96 * 11 * 11 * 3
  assert costs['conv2'] == 27 * 27 * 256 * 5 * 5 * 48
  assert costs['fc6'] == 9216 * 4096
  assert costs['pool1'] == costs['relu1'] == 0
  # The commonly quoted number is about 0.7 billion, for the paper's network and one crop.
  assert sum(costs.values()) == 724_406_816


def test_differences_name_both_values():
  paper = VARIANTS['paper']
  assert differences(paper, paper) == []
  assert 'stage 1: conv, relu, pool, LRN (conv, relu, LRN, pool)' in differences(VARIANTS['caffenet'], paper)
  assert 'norm1, norm2: k 1 (2)' in differences(VARIANTS['caffe'], paper)
  found = differences(VARIANTS['torchvision'], paper)
  assert 'conv1: features 64 (96)' in found
  assert not any('padding' in line for line in found)  # 'SAME' and 2 are equivalent here
  assert 'norm1, norm2a: groups 2 (1)' in differences(VARIANTS['original_code'], paper)


def test_every_layer_that_is_drawn_has_a_row():
  found = boxes(VARIANTS['cifar10_80sec'])
  assert [label for _, label, _ in found['fc6']] == ['64', 'ReLU']
  assert [label for _, label, _ in found['head']] == ['10']
  assert all(boxes(spec)['head'] for spec in VARIANTS.values())
