"""docs/family.md says what the specs say; its counts are those of the literature."""

import pathlib

from alexnet_flax import VARIANTS
from docs.family import differences, markdown, rows


def test_the_page_is_current():
  page = pathlib.Path('docs/family.md').read_text()
  assert page == markdown(), 'run: python -m alexnet_flax.family > docs/family.md'


def test_multiply_adds_by_hand():
  """conv1 of the paper: 55 * 55 places, 96 filters of 11 * 11 * 3; conv2 sees half of 96 channels."""
  costs = {row.name: row.multiply_adds for row in rows(VARIANTS['paper'])}
  assert costs['conv1'] == 55 * 55 * 96 * 11 * 11 * 3
  assert costs['conv2'] == 27 * 27 * 256 * 5 * 5 * 48
  assert costs['fc6'] == 9216 * 4096
  assert costs['pool1'] == costs['relu1'] == 0
  # "About 0.7 billion" is what is commonly said of AlexNet (the paper's network, one crop).
  assert sum(costs.values()) == 724_406_816


def test_differences_name_both_values():
  paper = VARIANTS['paper']
  assert differences(paper, paper) == []
  assert 'stage 1: conv, relu, pool, LRN (conv, relu, LRN, pool)' in differences(VARIANTS['caffenet'], paper)
  assert 'norm1, norm2: k 1 (2)' in differences(VARIANTS['caffe'], paper)
  found = differences(VARIANTS['torchvision'], paper)
  assert 'conv1: features 64 (96)' in found
  assert not any('padding' in line for line in found)  # 'SAME' and 2 are the same there
  assert 'norm1, norm2a: groups 2 (1)' in differences(VARIANTS['original_code'], paper)
