"""The authors' package lpips: the distance and its gradient, on the same weights of AlexNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, load_weights, lpips
from alexnet_flax.cli.main import main
from alexnet_flax.data.images import read_image
from alexnet_flax.inference.lpips import load_heads
from alexnet_flax.models.alexnet import AlexNet
from tests.helpers import encode, smooth_image

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
theirs = pytest.importorskip('lpips', reason='lpips is not installed')

SPEC = VARIANTS['torchvision']
SIZES = [(64, 64), (31, 40), (150, 90)]


@pytest.fixture(scope='module')
def network():
  """Their network, on random weights of torchvision's with He's deviation: features then differ by image."""
  torch.manual_seed(0)
  with pytest.warns(UserWarning, match='pretrained|Arguments other than'):
    network = theirs.LPIPS(net='alex', pnet_rand=True, verbose=False)
  with torch.no_grad():
    for parameter in network.net.parameters():
      if parameter.ndim > 1:
        parameter *= 6**0.5
  return network


@pytest.fixture(scope='module')
def pth(network, tmp_path_factory):
  """The same weights as a state dictionary of torchvision's whole network."""
  whole = torchvision.models.alexnet()
  features = [module for module in whole.features if hasattr(module, 'weight')]
  slices = [module for part in network.net.children() for module in part if hasattr(module, 'weight')]
  for ours, other in zip(features, slices, strict=True):
    ours.load_state_dict(other.state_dict())
  path = tmp_path_factory.mktemp('lpips') / 'alexnet.pth'
  torch.save(whole.state_dict(), path)
  return path


def images(height, width):
  """Three pairs, float32 [3, H, W, 3]: an image with noise, and two of different images."""
  rng = np.random.default_rng(height)
  first = np.stack([smooth_image(height, width, seed) for seed in range(3)]) / np.float32(255)
  second = first[[0, 2, 1]]
  second[0] = np.clip(first[0] + rng.normal(0, 0.1, first[0].shape), 0, 1)
  return first, second


def tensor(images):
  return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def compared(network, pth, size, dtype):
  """Their distances and ours, and their gradients by the first images and ours."""
  first, second = (one.astype(dtype) for one in images(*size))
  pixels = tensor(first).requires_grad_()
  expected = network(pixels, tensor(second), normalize=True).flatten()
  expected.sum().backward()
  variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), load_weights(pth, SPEC))
  model, heads = AlexNet(SPEC, dtype=dtype), load_heads()

  def total(first):
    found = lpips(model, variables, heads, first, jnp.asarray(second))
    return found.sum(), found

  gradient, found = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(first))
  return expected.detach().numpy(), found, pixels.grad.numpy().transpose(0, 2, 3, 1), gradient


@pytest.mark.parametrize('size', SIZES)
def test_distances_and_gradients(network, pth, size):
  expected, found, wanted, gradient = compared(network, pth, size, np.float32)
  assert expected.min() > 0.01
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  # In float32, rounding decides where a pool's gradient goes if two values are all but equal.
  assert np.linalg.norm(gradient - wanted) < 2e-2 * np.linalg.norm(wanted)


def test_where_images_differ(network, pth, monkeypatch):
  monkeypatch.setattr(network, 'spatial', True)
  first, second = (one.astype(np.float32) for one in images(*SIZES[0]))
  with torch.no_grad():
    expected = network(tensor(first), tensor(second), normalize=True)[:, 0].numpy()
  found = lpips(AlexNet(SPEC), load_weights(pth, SPEC), load_heads(), first, second, spatial=True)
  assert expected.min() < 0.5 * expected.max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_gradients_in_float64(network, pth):
  with jax.enable_x64(True):
    expected, found, wanted, gradient = compared(network.double(), pth, SIZES[-1], np.float64)
  network.float()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
  np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_the_command(network, pth, tmp_path, capsys):
  for name, seed in (('a.png', 1), ('b.png', 2)):
    (tmp_path / name).write_bytes(encode(smooth_image(60, 70, seed), 'PNG'))
  pair = [str(tmp_path / name) for name in ('a.png', 'b.png')]
  assert main(['distance', *pair, '--weights', str(pth)]) == 0
  first, second = (tensor(np.float32(read_image(path))[None] / 255) for path in pair)
  with torch.no_grad():
    expected = network(first, second, normalize=True).item()
  assert float(capsys.readouterr().out.split()[0]) == pytest.approx(expected, abs=1e-5)
