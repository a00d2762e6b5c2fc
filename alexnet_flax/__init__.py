"""AlexNet in JAX and Flax linen: the whole family, as data.

    from alexnet_flax import AlexNet, VARIANTS
    model = AlexNet(VARIANTS['torchvision'], num_classes=1000)

Importing this package imports neither TensorFlow nor TFDS.
"""

from alexnet_flax.losses import cross_entropy, mean_squared_error
from alexnet_flax.metrics import Metrics
from alexnet_flax.model import AlexNet
from alexnet_flax.optimizers import learning_rate_schedule, sgd
from alexnet_flax.specs import Spec
from alexnet_flax.steps import TrainState, create_train_state, eval_step, train_step
from alexnet_flax.variants import VARIANTS

__all__ = [
  'VARIANTS',
  'AlexNet',
  'Metrics',
  'Spec',
  'TrainState',
  'create_train_state',
  'cross_entropy',
  'eval_step',
  'learning_rate_schedule',
  'mean_squared_error',
  'sgd',
  'train_step',
]
