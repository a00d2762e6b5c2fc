"""The article's network on ImageNet, with a schedule of today.

The article gives no training. This recipe is batch 256, SGD with momentum 0.9, weight decay 5e-4 on
kernels, 90 epochs, the random resized crop and mirroring of torchvision's reference recipe
(references/classification), with a rate that falls by half a cosine (Loshchilov and Hutter 2016) after
a warm-up of 5 epochs (Goyal et al. 2017). The rate follows the BatchNorm AlexNet of
cvjena/cnn-models: 0.05 at batch 256; it is worked out here, so whoever overrides the batch size on the
command line overrides the rate too. Not run to its end by us: see README, "Accuracy".
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """`arg` names another variant: --config=configs/imagenet.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'batchnorm'
  # Without BatchNorm a fifth of the rate is what the published recipes bear (0.01 at batch 256).
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
