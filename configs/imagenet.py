"""AlexNet with batch normalization on ImageNet, with a modern schedule.

The network's source has no training recipe. This one is batch 256, SGD with momentum 0.9, weight decay 5e-4
on kernels, 90 epochs, the random resized crop and mirroring of torchvision's reference recipe
(references/classification), and a cosine schedule (Loshchilov and Hutter 2016) after a warm-up of 5 epochs
(Goyal et al. 2017). The learning rate is that of cvjena/cnn-models' AlexNet with BatchNorm, 0.05 at batch
256. It is computed here, so a command that overrides the batch size must override the rate too. We have not
run this recipe to its end: see README, "Accuracy".
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/imagenet.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'batchnorm'
  # Published recipes without BatchNorm use a fifth of the rate: 0.01 at batch 256.
  base_learning_rate = 0.05 if config.model.variant.startswith('batchnorm') else 0.01

  config.data.dataset = 'imagenet2012'
  config.data.eval_split = 'validation'
  config.data.batch_size = 256

  config.optimizer.learning_rate = (base_learning_rate / 256) * config.data.batch_size
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.weight_decay = 5e-4
  config.total_epochs = 90.0
  return config
