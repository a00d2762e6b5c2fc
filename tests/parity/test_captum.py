"""captum: every attribution of torchvision's network, in float64, where rounding decides no maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, AlexNet, load_weights
from alexnet_flax.export import parity
from alexnet_flax.inference import attributions

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
captum = pytest.importorskip('captum', reason='captum is not installed')
attr = pytest.importorskip('captum.attr', reason='captum is not installed')

SPEC = VARIANTS['torchvision']
PROGRAM = f'captum {captum.__version__}, PyTorch {torch.__version__}'
CLASSES = [3, 700]
STEPS, WINDOW, STRIDE = 6, 60, 50
# Of the greatest value. Grad-CAM is float32, and so are the two colours.
TOLERANCES = dict.fromkeys(attributions.METHODS, 1e-9) | {
  'grad_cam': 1e-5,
  'integrated_gradients': 1e-6,
  'occlusion': 1e-6,
}
OPTIONS = {
  'smoothgrad': {'samples': STEPS},
  'integrated_gradients': {'steps': STEPS},
  'occlusion': {'window': WINDOW, 'stride': STRIDE},
}

pytestmark = [
  pytest.mark.filterwarnings('ignore:Setting (forward|backward)', 'ignore:Input Tensor'),
  pytest.mark.usefixtures('standard_promotion'),  # of the colours, float32 by their preprocessing
]


@pytest.fixture(scope='module')
def network():
  torch.manual_seed(0)
  network = torchvision.models.alexnet().eval()
  for module in network.modules():
    if isinstance(module, torch.nn.ReLU):
      module.inplace = False  # captum's hooks need what was before it
  return network.double()


@pytest.fixture(scope='module')
def images(photographs):
  return np.float64(parity.network_inputs(SPEC, photographs).normalized)


def grey(value):
  """A grey as the network receives it, [1, 3, 1, 1]."""
  preprocessing = SPEC.preprocessing
  normal = (value / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
  return torch.tensor(normal).reshape(1, 3, 1, 1)


def of_captum(method, network, x, monkeypatch):
  """What captum says, as [N, 3, H, W]."""
  match method:
    case 'gradient':
      return attr.Saliency(network).attribute(x, CLASSES, abs=False)
    case 'smoothgrad':
      noise = np.random.default_rng(0).standard_normal((STEPS, 224, 224, 3))
      drawn = torch.tensor(noise.transpose(0, 3, 1, 2).copy())
      monkeypatch.setattr(torch, 'normal', lambda mean, deviations: mean + deviations * drawn)
      tunnel = attr.NoiseTunnel(attr.Saliency(network))
      deviations = [0.15 * (image.max() - image.min()).item() for image in x]
      return torch.cat(
        [
          tunnel.attribute(image[None], nt_samples=STEPS, stdevs=deviation, target=target, abs=False)
          for image, target, deviation in zip(x, CLASSES, deviations, strict=True)
        ]
      )
    case 'integrated_gradients':
      start = grey(0).expand(1, 3, 224, 224)
      return attr.IntegratedGradients(network).attribute(x, start, CLASSES, n_steps=STEPS)
    case 'guided_backprop':
      return attr.GuidedBackprop(network).attribute(x, CLASSES)
    case 'deconvnet':
      return attr.Deconvolution(network).attribute(x, CLASSES)
    case 'grad_cam':
      return attr.LayerGradCam(network, network.features[11]).attribute(x, CLASSES, relu_attributions=True)
    case 'occlusion':
      window, strides = (3, WINDOW, WINDOW), (3, STRIDE, STRIDE)
      covered = grey(127).expand(1, 3, 224, 224)
      return attr.Occlusion(network).attribute(x, window, strides, covered, CLASSES, perturbations_per_eval=5)


@pytest.mark.parametrize('method', attributions.METHODS)
def test_attributions(method, network, images, tmp_path, monkeypatch):
  monkeypatch.setattr(attributions, '_BATCH', 2)
  torch.save(network.state_dict(), tmp_path / 'alexnet.pth')
  x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
  theirs = of_captum(method, network, x, monkeypatch).detach().numpy().transpose(0, 2, 3, 1)
  with jax.enable_x64(True):
    variables = jax.tree.map(jnp.float64, load_weights(tmp_path / 'alexnet.pth', SPEC))
    ours = attributions.METHODS[method](
      AlexNet(SPEC, dtype=jnp.float64),
      variables,
      images,
      CLASSES,
      preprocessed=True,
      **OPTIONS.get(method, {}),
    )
  if ours.ndim == 3:  # a map, which is each channel's
    ours = ours[..., None]
  if method == 'grad_cam':
    theirs = theirs / theirs.max((1, 2, 3), keepdims=True)
  error = parity.greatest_error(np.broadcast_to(ours, theirs.shape), theirs)
  print(f'{PROGRAM}: {method}: {error:.1e}')
  assert np.abs(theirs).max((1, 2, 3)).min() > 0
  assert error < TOLERANCES[method]
