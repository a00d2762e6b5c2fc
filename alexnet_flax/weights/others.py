"""AlexNets of other architectures that people have in PyTorch, known by their tensors' names, and refused.

Names and layers are those of each repository's own code.
"""

import re
from collections.abc import Iterable

from alexnet_flax.errors import UsageError

# What a tensor is called in such a network, what the network is, and what ours lack.
_OTHERS = (
  (
    r'(^|\.)(l_to_ab|ab_to_l)\.',
    "CMC's two-stream AlexNet (HobbitLong/CMC): half of its channels see L of Lab images, half a and b",
    'our networks take RGB, in one stream',
  ),
  (
    r'(^|\.)conv_block_1\.1\.weight$',
    "IPCL's AlexNet (harvard-visionlab/open_ipcl): convolutions without bias, GroupNorm before each ReLU",
    'our networks have no GroupNorm',
  ),
  (
    r'(^|\.)sobel\.0\.weight$',
    "DeepCluster's AlexNet (facebookresearch/deepcluster): Sobel filters on the input, BatchNorm before each"
    ' ReLU',
    'our networks have no Sobel filters',
  ),
  (
    r'(^|\.)top_layer\.weight$',
    "DeepCluster's network (facebookresearch/deepcluster) without Sobel filters: BatchNorm before each ReLU",
    'none of our variants has that order without groups',
  ),
)


def refuse_others(tensor_names: Iterable[str]) -> None:
  """Raises UsageError, which says what network it is, if tensors are of a known one that we do not have."""
  names = list(tensor_names)
  for pattern, network, lacking in _OTHERS:
    if any(re.search(pattern, name) for name in names):
      raise UsageError(f'this is {network}; not supported: {lacking}')
