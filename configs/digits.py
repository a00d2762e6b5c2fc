"""Scikit-learn's embedded digits: AlexNet with batch normalization at a quarter of its width; under a minute.

The only augmentation is a slight random crop; mirrored digits are not digits. With some 450 steps,
BatchNorm's momentum of 0.99 would leave the running statistics near their initial values, so it is 0.9.
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/digits.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'batchnorm'
  config.model.width = 0.25
  config.model.image_size = 67
  config.model.batch_norm_momentum = 0.9

  config.data.dataset = 'digits'
  config.data.batch_size = 32
  config.data.eval_batch_size = 128
  config.data.crop_scale = (0.7, 1.0)
  config.data.crop_ratio = (0.9, 1.1)
  config.data.flip = False
  config.data.center_crop_share = 1.0

  config.optimizer.learning_rate = 0.02
  config.optimizer.warmup_epochs = 1.0
  config.total_epochs = 10.0
  return config
