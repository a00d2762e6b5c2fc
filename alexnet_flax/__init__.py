"""AlexNet in JAX and Flax linen: the whole family, as data.

    from alexnet_flax import AlexNet, VARIANTS
    model = AlexNet(VARIANTS['torchvision'], num_classes=1000)

Importing this package needs its core dependencies alone: no TensorFlow, no Pillow, nothing that only training
or reports use. `train` is imported at its first use and needs the extra `train`.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError, needs_extra
from alexnet_flax.inference.features import features
from alexnet_flax.inference.grad_cam import grad_cam
from alexnet_flax.losses import cross_entropy, mean_squared_error
from alexnet_flax.metrics import Metrics
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import (
  Activation,
  BatchNorm,
  Constant,
  Conv,
  Dense,
  Dropout,
  Flatten,
  LocalResponseNorm,
  Multipliers,
  Normal,
  Pool,
  Preprocessing,
  SpatialResponseNorm,
  Spec,
  UniformFanIn,
  VarianceScaling,
)
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.optim import learning_rate_schedule, sgd
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.steps import TrainState, create_train_state, eval_step, train_step
from alexnet_flax.weights import load_weights, save_weights

if TYPE_CHECKING:
  from alexnet_flax.training.callbacks import Callback

__version__: str = importlib.metadata.version('alexnet_flax')
__all__ = [
  'VARIANTS', 'Activation', 'AlexNet', 'BatchNorm', 'Config', 'Constant', 'Conv', 'Dense', 'Dropout',
  'Flatten', 'LocalResponseNorm', 'Metrics', 'Multipliers', 'Normal', 'Pool', 'Preprocessing',
  'SpatialResponseNorm', 'Spec', 'TrainState', 'UniformFanIn', 'UsageError', 'VarianceScaling',
  '__version__', 'create_train_state', 'cross_entropy', 'eval_step', 'features', 'grad_cam',
  'learning_rate_schedule', 'load_pretrained', 'load_weights', 'mean_squared_error', 'save_weights', 'sgd',
  'train', 'train_step',
]  # fmt: skip


def train(
  config: Config, workdir: str | os.PathLike[str], callbacks: 'Sequence[Callback]' = ()
) -> dict[str, float]:
  """Trains; see `alexnet_flax.training.train.train`. The call imports the extra `train`."""
  with needs_extra('alexnet_flax.train'):
    from alexnet_flax.training import train as training
  return training.train(config, workdir, callbacks)
