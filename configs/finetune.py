"""Transfer learning: starts from the weights of another run.

By default it trains the digits from the CIFAR-10 network of configs/cifar10.py, with frozen convolutions and
a new head. The same keys take any other source and data set; variant, width and image size are the source's,
unless the command line says otherwise:

  python train.py --config=configs/finetune.py --config.transfer.source=torchvision \\
      --config.data.dataset=oxford_flowers102 --config.data.eval_split=validation

Your own images have a recipe that fits their number: configs/folder.py.

--config.transfer.mode=linear_probe computes the features once and trains only the head. The new head learns
ten times as fast as the pretrained layers, as in Caffe's fine-tuning example (BVLC/caffe,
models/finetune_flickr_style).
"""

from alexnet_flax.config import Config, config_dict, fill_in, leave_open, with_norms
from alexnet_flax.models.spec import BatchNorm
from alexnet_flax.training.initialize import model_keys


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/finetune.py:torchvision."""
  config = config_dict(Config())
  leave_open(config, 'model.variant', 'model.width')
  if arg is not None:
    config.model.variant = arg

  config.transfer.source = 'runs/cifar10'
  config.transfer.freeze = 'conv*'
  config.transfer.learning_rates = 'head:10'

  config.data.dataset = 'digits'
  config.data.batch_size = 32
  config.data.eval_batch_size = 128
  config.data.crop_scale = (0.7, 1.0)
  config.data.crop_ratio = (0.9, 1.1)
  config.data.flip = False
  config.data.center_crop_share = 1.0

  config.optimizer.learning_rate = 0.001
  config.optimizer.warmup_epochs = 1.0
  config.total_epochs = 5.0
  return config


def complete(config):
  """Takes the network from the source, where the command line leaves it open."""
  fill_in(config, model_keys(config.transfer.source or 'random'))
  fill_in(config, {'model.variant': 'batchnorm', 'model.width': 1.0, 'model.image_size': 64})
  if any(isinstance(layer, BatchNorm) for layer in with_norms(config.model).layers):
    fill_in(config, {'model.batch_norm_momentum': 0.9})
