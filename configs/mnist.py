"""MNIST enlarged to 64x64, half the width. Prepare it with: alexnet-flax prepare mnist.

The learning rate is that of the digits, scaled linearly with the batch (Goyal et al. 2017, section 2.1).
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/mnist.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'batchnorm'
  config.model.width = 0.5
  config.model.image_size = 64
  config.model.batch_norm_momentum = 0.9

  config.data.dataset = 'mnist'
  config.data.batch_size = 128
  config.data.crop_scale = (0.7, 1.0)
  config.data.crop_ratio = (0.9, 1.1)
  config.data.flip = False
  config.data.center_crop_share = 1.0

  config.optimizer.learning_rate = (0.02 / 32) * config.data.batch_size
  config.optimizer.warmup_epochs = 0.5
  config.total_epochs = 5.0
  return config
