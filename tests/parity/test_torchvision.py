"""torchvision's own alexnet: every endpoint, every gradient, and its state dictionary there and back."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from alexnet_flax import VARIANTS, AlexNet, cross_entropy, load_weights, save_weights
from alexnet_flax.errors import UsageError
from alexnet_flax.export import parity
from alexnet_flax.weights import open_weights
from alexnet_flax.weights.layout import from_channels_first, tensors_of
from alexnet_flax.weights.torchvision import tensor_names
from tests.helpers import random_variables

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')

SPEC = VARIANTS['torchvision']
PROGRAM = f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}'


@pytest.fixture(scope='module')
def network():
  torch.manual_seed(0)
  return torchvision.models.alexnet().eval()


@pytest.fixture(scope='module')
def pth(network, tmp_path_factory):
  path = tmp_path_factory.mktemp('torch') / 'alexnet.pth'
  torch.save(network.state_dict(), path)
  return path


def test_every_endpoint(pth, photographs, agree):
  program, errors = parity.compare(open_weights(pth), SPEC, load_weights(pth, SPEC), photographs)
  assert {'input', 'conv1', 'drop5', 'fc6', 'fc8'} < set(errors)
  agree(program, 'torchvision, its own initial weights: input and every endpoint', errors)


def test_every_endpoint_with_our_weights(photographs, tmp_path, agree):
  path = tmp_path / 'ours.safetensors'
  save_weights(path, SPEC, random_variables(SPEC), names='torchvision')
  program, errors = parity.compare(open_weights(path), SPEC, load_weights(path, SPEC), photographs)
  agree(program, 'torchvision, random weights, safetensors: input and every endpoint', errors)


# In float64, for in float32 rounding decides where a pool's gradient goes if two values are all but equal.
def test_every_gradient(pth, photographs, agree):
  labels = np.array([3, 700])
  images = np.float64(parity.network_inputs(SPEC, photographs).normalized)
  network = torchvision.models.alexnet().eval()
  network.load_state_dict(torch.load(pth, weights_only=True))
  network.double()
  pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy(), requires_grad=True)
  torch.nn.functional.cross_entropy(network(pixels), torch.tensor(labels)).backward()

  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), load_weights(pth, SPEC)['params'])

    def loss(params, images):
      logits = AlexNet(SPEC, dtype=jnp.float64).apply({'params': params}, images, train=False)
      return cross_entropy(logits, jnp.asarray(labels)).mean()

    ours, of_images = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(images))
  found = traverse_util.flatten_dict({'params': ours}, sep='/')
  theirs = dict(network.named_parameters())
  errors = {
    name: parity.greatest_error(
      np.asarray(found[name]), from_channels_first(name, theirs[key].grad.numpy(), SPEC)
    )
    for name, key in tensor_names(SPEC).items()
  }
  errors['images'] = parity.greatest_error(np.asarray(of_images), pixels.grad.numpy().transpose(0, 2, 3, 1))
  agree(PROGRAM, 'torchvision: gradient by every parameter and by the images, float64', errors)


def test_a_state_dictionary_in_and_out_and_in_again_is_the_same_to_the_bit(network, pth, tmp_path):
  first = load_weights(pth, SPEC)
  save_weights(tmp_path / 'out.pth', SPEC, first)
  out = torch.load(tmp_path / 'out.pth', weights_only=True)
  original = network.state_dict()
  assert list(out) == list(original)
  assert all(torch.equal(out[name], tensor) for name, tensor in original.items())
  torchvision.models.alexnet().load_state_dict(out)
  again = tensors_of(load_weights(tmp_path / 'out.pth', SPEC))
  for name, tensor in tensors_of(first).items():
    np.testing.assert_array_equal(again[name], tensor)


class Code:
  """What a malicious file does to whoever unpickles it."""

  def __reduce__(self):
    return (pytest.fail, ('the pickle was executed',))


def test_a_pickle_with_code_is_refused_unexecuted(tmp_path):
  for number, content in enumerate([Code(), {'features.0.weight': torch.zeros(1), 'x': Code()}]):
    path = tmp_path / f'{number}.pth'
    torch.save(content, path)
    with pytest.raises(UsageError, match=r'holds \S+, not a state dictionary|tensor x is not a dense one'):
      load_weights(path, SPEC)


def test_broken_and_other_files(pth, tmp_path):
  content = pth.read_bytes()
  other = torch.nn.Linear(2, 2)
  torch.save(other.state_dict(), tmp_path / 'linear.pth')
  torch.save([1, 2], tmp_path / 'list.pth')
  (tmp_path / 'short.pth').write_bytes(content[: len(content) // 2])
  for name, message in [
    ('linear.pth', 'missing tensors features.0.weight'),
    ('list.pth', 'not a state dictionary'),
    ('short.pth', 'broken'),
  ]:
    with pytest.raises(UsageError, match=message):
      load_weights(tmp_path / name, SPEC)


@pytest.mark.parametrize('zipped', [True, False])
def test_checkpoints_as_pytorch_writes_them(network, pth, tmp_path, zipped):
  """torchvision's reference checkpoint, wrapped modules, averages, other types, views of one storage."""
  own, expected = network.state_dict(), tensors_of(load_weights(pth, SPEC))
  optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict()
  flat, start, views = torch.cat([tensor.flatten() for tensor in own.values()]), 0, {}
  for name, tensor in own.items():
    views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
    start += tensor.numel()
  parallel = torchvision.models.alexnet()
  parallel.load_state_dict(own)
  parallel.features = torch.nn.DataParallel(parallel.features)
  for number, content in enumerate(
    [
      {'model': own, 'optimizer': optimizer, 'args': argparse.Namespace(lr=0.1), 'epoch': 3},
      {'state_dict': parallel.state_dict(), 'arch': 'alexnet'},
      torch.optim.swa_utils.AveragedModel(network).state_dict(),
      torch.compile(network).state_dict(),
      {name: torch.nn.Parameter(tensor) for name, tensor in own.items()},
      {name: tensor.double() for name, tensor in own.items()},
      views,
    ]
  ):
    path = tmp_path / f'{number}.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name, tensor in tensors_of(load_weights(path, SPEC)).items():
      np.testing.assert_array_equal(tensor, expected[name])
    path.unlink()
