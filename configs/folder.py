"""Your own images, SPLIT/CLASS/image.jpg or CLASS/image.jpg: from scratch, or from a trained network.

  python train.py --config=configs/folder.py --config.data.data_dir=DIR
  python train.py --config=configs/folder.py --config.data.data_dir=DIR --config.transfer.source=RUN

What the command line leaves open follows from the number N of training images:

  batch       N / 8, as a power of two between 8 and 128: some eight steps an epoch or more
  steps       so many that 20,000 images are seen, or each image 30 times; a fifth of them after a transfer
  rate        0.1 for 256 images with BatchNorm, 0.02 without, scaled linearly with the batch (Goyal et al.
              2017); a tenth of it after a transfer, and ten times that for the new head
  warm-up     a twentieth of the steps
  BatchNorm   a momentum that averages over a tenth of the steps, between 0.9 and 0.99

From scratch it is AlexNet with batch normalization at a quarter of its width, on 128x128. A transfer takes
variant, width and image size from its source. docs/runs.md has results.
"""

import operator

from alexnet_flax.config import Config, config_dict, fill_in, leave_open, value_of, with_norms
from alexnet_flax.data.tfds_source import open_dataset, split_names
from alexnet_flax.models.spec import BatchNorm
from alexnet_flax.training.initialize import model_keys

_PERIODS = ('total', 'eval_every', 'checkpoint_every', 'optimizer.warmup')


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/folder.py:torchvision."""
  config = config_dict(Config())
  leave_open(config, 'model.variant', 'model.width', 'data.eval_split', 'data.batch_size')
  leave_open(config, 'optimizer.learning_rate', 'transfer.learning_rates')
  leave_open(config, *(f'{period}_epochs' for period in _PERIODS))
  if arg is not None:
    config.model.variant = arg
  config.data.dataset = 'image_folder'
  config.data.crop_scale = (0.35, 1.0)
  config.data.on_bad_image = 'skip'
  config.optimizer.schedule = 'cosine'
  return config


def complete(config):
  """Sets what the command line leaves open."""
  data, source = config.data, config.transfer.source
  if data.eval_split is None:
    held_out = [name for name in split_names(data.dataset, data.data_dir) if name != data.train_split]
    usual = [name for name in ('validation', 'valid', 'val', 'dev', 'test') if name in held_out]
    fill_in(config, {'data.eval_split': [*usual, *held_out, 'validation'][0]})
  images = open_dataset(data.dataset, data.train_split, data.data_dir).num_examples
  fill_in(config, model_keys(source) if source else {})
  fill_in(config, {'model.variant': 'batchnorm', 'model.width': 0.25, 'model.image_size': 128})

  batch = 1 << min(max((images // 8).bit_length() - 1, 3), 7)
  fill_in(config, {'data.batch_size': batch, 'data.eval_batch_size': 128})
  steps = max(20_000, 30 * images) // max(data.batch_size, 1) // (5 if source else 1)
  if config.total_epochs is not None:
    steps = round(config.total_epochs * images / max(data.batch_size, 1))
  steps = config.total_steps or max(steps, 1)
  lengths = steps, max(steps // 10, 1), max(steps // 5, 1), steps // 20
  for period, length in zip(_PERIODS, lengths, strict=True):
    epochs = f'{period}_epochs'
    if operator.attrgetter(epochs)(config) is None:  # given in epochs, it is not said in steps
      fill_in(config, {f'{period}_steps': length, epochs: value_of(Config(), epochs)})

  has_norms = any(isinstance(layer, BatchNorm) for layer in with_norms(config.model).layers)
  rate = (0.1 if has_norms else 0.02) / 256 * data.batch_size
  fill_in(config, {'optimizer.learning_rate': rate / 10 if source else rate})
  fill_in(config, {'transfer.learning_rates': 'head:10' if source else ''})
  if has_norms:
    fill_in(config, {'model.batch_norm_momentum': min(max(1 - 10 / steps, 0.9), 0.99)})
