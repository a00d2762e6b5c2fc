"""AlexNet in JAX and Flax linen: the whole family, as data.

    from alexnet_flax import AlexNet, VARIANTS
    model = AlexNet(VARIANTS['torchvision'], num_classes=1000)

Importing this package imports neither TensorFlow nor TFDS.
"""

from alexnet_flax.inference.features import features
from alexnet_flax.inference.grad_cam import grad_cam
from alexnet_flax.losses import cross_entropy, mean_squared_error
from alexnet_flax.metrics import Metrics
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Spec
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.optim import learning_rate_schedule, sgd
from alexnet_flax.steps import TrainState, create_train_state, eval_step, train_step
from alexnet_flax.weights import load_weights, save_weights

__all__ = [
  'VARIANTS',
  'AlexNet',
  'Metrics',
  'Spec',
  'TrainState',
  'create_train_state',
  'cross_entropy',
  'eval_step',
  'features',
  'grad_cam',
  'learning_rate_schedule',
  'load_weights',
  'mean_squared_error',
  'save_weights',
  'sgd',
  'train_step',
]
