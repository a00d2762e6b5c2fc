"""How far our activations are, layer by layer, from those of the program that a weights file comes from."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import evaluation_view
from alexnet_flax.errors import needs_extra
from alexnet_flax.inference.features import features
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec
from alexnet_flax.weights.format import Inputs, WeightsFile


def greatest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Returns the greatest |a - b| over the greatest |b|."""
  scale = float(np.abs(theirs).max())
  return float(np.abs(ours - theirs).max()) / (scale or 1.0)


def compare(
  file: WeightsFile, spec: Spec, variables: Any, images: Sequence[np.ndarray]
) -> tuple[str, dict[str, float]]:
  """Compares the input and every layer with a weights file's own program.

  Args:
    file, spec, variables: A weights file of another program, its network, and what was loaded from the file.
    images: uint8 RGB [H, W, 3], of any sizes.

  Returns:
    The other program with its version, and layer -> greatest error, 'input' first.

  Raises:
    UsageError: The program is not installed.
  """
  assert file.format.activations is not None
  num_classes = variables['params'][spec.head]['bias'].shape[0]
  inputs = network_inputs(spec, images)
  with needs_extra('--verify'):
    program, theirs = file.format.activations(file, spec, num_classes, inputs)
  layers, model = [name for name in theirs if name != 'input'], AlexNet(spec, num_classes)
  taps = features(model, variables, inputs.normalized, layers, preprocessed=True, batch_size=len(images))
  ours = {'input': inputs.normalized, **taps}
  return program, {name: greatest_error(ours[name], theirs[name]) for name in theirs}


def network_inputs(spec: Spec, images: Sequence[np.ndarray]) -> Inputs:
  """Returns images of any sizes, our views of them, and these normalized."""
  views = np.stack([evaluation_view(image, spec) for image in images])
  normalized = normalize({'image': jnp.asarray(views)}, preprocessing=spec.preprocessing)['image']
  return Inputs(images, views, np.asarray(normalized))
