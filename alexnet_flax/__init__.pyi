# The public names, which `__init__.py` imports at their first use.
import collections.abc
import os

import alexnet_flax.training.callbacks

from .config import Config
from .errors import UsageError
from .inference.attributions import (
  deconvnet,
  gradient,
  guided_backprop,
  integrated_gradients,
  occlusion,
  smoothgrad,
)
from .inference.features import features
from .inference.grad_cam import grad_cam
from .inference.lpips import lpips
from .losses import cross_entropy, mean_squared_error
from .metrics import Metrics
from .models.alexnet import AlexNet
from .models.spec import (
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
from .models.variants import VARIANTS
from .optim import learning_rate_schedule, sgd
from .pretrained import load_pretrained
from .steps import TrainState, create_train_state, eval_step, train_step
from .training.cpu_memory import keep_cpu_memory
from .weights import load_weights, save_weights

__version__: str
__all__ = [
  'Activation', 'AlexNet', 'BatchNorm', 'Config', 'Constant', 'Conv', 'Dense', 'Dropout', 'Flatten',
  'LocalResponseNorm', 'Metrics', 'Multipliers', 'Normal', 'Pool', 'Preprocessing', 'SpatialResponseNorm',
  'Spec', 'TrainState', 'UniformFanIn', 'UsageError', 'VARIANTS', 'VarianceScaling', '__version__',
  'create_train_state', 'cross_entropy', 'deconvnet', 'eval_step', 'features', 'grad_cam', 'gradient',
  'guided_backprop', 'integrated_gradients', 'keep_cpu_memory', 'learning_rate_schedule', 'load_pretrained',
  'load_weights', 'lpips', 'mean_squared_error', 'occlusion', 'save_weights', 'sgd', 'smoothgrad', 'train',
  'train_step',
]  # fmt: skip

def train(
  config: Config,
  workdir: str | os.PathLike[str],
  callbacks: collections.abc.Sequence[alexnet_flax.training.callbacks.Callback] = (),
) -> dict[str, float]: ...
