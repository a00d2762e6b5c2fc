"""Networks made from networks: norms for ablations. tests/training/test_transfer.py has the rest."""

import pytest

from alexnet_flax import VARIANTS, BatchNorm
from alexnet_flax.errors import UsageError
from alexnet_flax.models.surgery import with_batch_norm, without_response_norms


def names(spec):
  return ' '.join(name for name, _ in spec.named_layers())


# By hand: the first stage, and the first fully connected one.
@pytest.mark.parametrize(
  ('variant', 'place', 'first', 'hidden'),
  [
    ('batchnorm', 'none', 'conv1 relu1 pool1 conv2', 'flatten fc6 relu6 drop6 fc7'),
    ('batchnorm', 'before', 'conv1 norm1 relu1 pool1 conv2', 'flatten fc6 relu6 drop6 fc7'),
    ('batchnorm', 'after', 'conv1 relu1 norm1 pool1 conv2', 'flatten fc6 relu6 drop6 fc7'),
    ('batchnorm_grouped', 'none', 'norm0 conv1 relu1 pool1 conv2', 'flatten fc6 relu6 fc7'),
    ('batchnorm_grouped', 'before', 'norm0 conv1 norm1 relu1 pool1 conv2', 'flatten fc6 norm6 relu6 fc7'),
    ('batchnorm_grouped', 'after', 'norm0 conv1 relu1 norm1 pool1 conv2', 'flatten fc6 relu6 norm6 fc7'),
    ('batchnorm_prose', 'before', 'conv1 norm1a relu1 norm1b pool1', 'norm5c fc6 norm6 relu6 drop6 fc7'),
    ('batchnorm_prose', 'after', 'conv1 relu1 norm1a norm1b pool1', 'norm5c fc6 relu6 norm6 drop6 fc7'),
    ('paper', 'after', 'conv1 relu1 norm1a norm1b pool1', 'flatten fc6 relu6 norm6 drop6 fc7'),
    ('torchvision', 'before', 'conv1 norm1 relu1 pool1', 'drop5 fc6 norm6 relu6 drop6 fc7 norm7 relu7 fc8'),
    ('original_code', 'after', 'conv1 norm1a pool1 relu1 norm1b', 'flatten fc6 relu6 norm6 drop6 fc7'),
    ('cifar10_80sec', 'after', 'conv1 relu1 norm1 pool1 conv2', 'pool3 flatten fc4 relu4 norm4 fc5'),
  ],
)
def test_batch_norm_changes_sides_is_added_or_removed(variant, place, first, hidden):
  changed = with_batch_norm(VARIANTS[variant], place)
  assert names(changed).startswith(first)
  assert hidden in names(changed)


def test_what_the_networks_have_is_kept():
  for name in ('batchnorm', 'batchnorm_prose'):
    assert with_batch_norm(VARIANTS[name], 'after') == VARIANTS[name]
  grouped = VARIANTS['batchnorm_grouped']
  assert with_batch_norm(grouped, 'before') == grouped
  moved = with_batch_norm(grouped, 'after')
  assert [layer for layer in moved.layers if isinstance(layer, BatchNorm)] == [
    layer for layer in grouped.layers if isinstance(layer, BatchNorm)
  ]
  assert with_batch_norm(moved, 'before') == grouped
  for spec in VARIANTS.values():
    assert with_batch_norm(with_batch_norm(spec, 'after'), 'none') == with_batch_norm(spec, 'none')


def test_response_norms_of_both_kinds_are_left_out():
  assert names(without_response_norms(VARIANTS['original_code'])).startswith(
    'conv1 pool1 relu1 conv2 relu2 pool2'
  )
  assert names(without_response_norms(VARIANTS['cifar10_full'])).startswith(
    'conv1 relu1 pool1 conv2 relu2 pool2'
  )
  assert without_response_norms(VARIANTS['torchvision']) == VARIANTS['torchvision']


def test_an_unknown_place():
  with pytest.raises(UsageError, match="unknown place of BatchNorm 'befor'; did you mean 'before'"):
    with_batch_norm(VARIANTS['paper'], 'befor')
