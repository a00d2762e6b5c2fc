"""CIFAR-10 enlarged to 64x64: AlexNet with batch normalization at full width.

The only augmentation is mirroring, as in the 2012 paper's CIFAR experiment (section 3.1, figure 1); the
view is the whole image. With a few hundred steps per epoch, BatchNorm's momentum of 0.99 would lag, so it
is 0.9. docs/runs.md has the results.
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/cifar10.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'batchnorm'
  config.model.image_size = 64
  config.model.batch_norm_momentum = 0.9

  config.data.dataset = 'cifar10'
  config.data.batch_size = 128
  config.data.crop_scale = (1.0, 1.0)
  config.data.crop_ratio = (1.0, 1.0)
  config.data.center_crop_share = 1.0

  config.optimizer.learning_rate = 0.05
  config.optimizer.warmup_epochs = 0.5
  config.total_epochs = 3.0
  return config
