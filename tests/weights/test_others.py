"""AlexNets that people have in PyTorch and that are not ours: files in their layouts are refused by name."""

import numpy as np
import pytest
from safetensors.numpy import save

from alexnet_flax.cli.main import main
from alexnet_flax.weights import pth


def blocks(prefix, inputs, norm):
  """The first block and the head of CMC's and IPCL's networks."""
  shapes = {'conv_block_1.0.weight': (6, inputs, 11, 11), 'fc8.0.weight': (8, 6), 'fc8.0.bias': (8,)}
  shapes |= {f'conv_block_1.1.{name}': (6,) for name in norm}
  return {prefix + name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var')
CMC = blocks('module.l_to_ab.', 1, BATCH_NORM) | blocks('module.ab_to_l.', 2, BATCH_NORM)
IPCL = blocks('module.', 3, ('weight', 'bias'))
DEEP_CLUSTER = {
  'features.module.0.weight': np.zeros((6, 2, 11, 11), np.float32),
  **{f'features.module.1.{name}': np.zeros(6, np.float32) for name in BATCH_NORM},
  'classifier.1.weight': np.zeros((8, 36), np.float32),
  'top_layer.weight': np.zeros((10, 8), np.float32),
}
SOBEL = {'sobel.0.weight': np.zeros((1, 3, 1, 1), np.float32)}


@pytest.mark.parametrize(
  ('tensors', 'message'),
  [
    (CMC, "this is CMC's two-stream AlexNet (HobbitLong/CMC)"),
    ({f'encoder.{name}': array for name, array in CMC.items()}, "this is CMC's two-stream AlexNet"),
    (IPCL, "this is IPCL's AlexNet (harvard-visionlab/open_ipcl)"),
    (DEEP_CLUSTER | SOBEL, "this is DeepCluster's AlexNet (facebookresearch/deepcluster): Sobel filters"),
    (DEEP_CLUSTER, "this is DeepCluster's network (facebookresearch/deepcluster) without Sobel filters"),
  ],
)
def test_a_file_is_refused_by_the_name_of_its_network(tensors, message, tmp_path, capsys):
  files = tmp_path / 'checkpoint.pth.tar', tmp_path / 'model.safetensors'
  files[0].write_bytes(pth.dump_state_dict(tensors))
  files[1].write_bytes(save(tensors))
  features = ['--layers', 'fc7', '--out', str(tmp_path / 'f.npz')]
  for command in (
    ['predict', str(tmp_path), str(files[0])],
    ['predict', str(tmp_path), '--weights', str(files[1])],
    ['features', str(tmp_path), '--weights', str(files[0]), *features],
    ['convert', str(files[0]), str(tmp_path / 'a.safetensors')],
    ['evaluate', str(files[0]), '--dataset', 'digits'],
  ):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f': {message}' in error
    assert 'not supported: ' in error
    assert error.count('\n') == 1
