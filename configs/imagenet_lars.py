"""AlexNet with batch normalization on ImageNet in batches of 8,192 to 32,768, by LARS (You et al. 2017).

  python train.py --config=configs/imagenet_lars.py --config.data.batch_size=16384

Rate, steps and warm-up follow from the batch. They are those of NVIDIA/caffe's models/alexnet_bn, whose
network has other norms than ours, whose optimizer clips ("LARC"), and whose warm-up begins at a rate of 1,
ours at 0. With `--config.mesh.model=8`, eight devices share the fully connected layers. We have not run this
recipe.
"""

from alexnet_flax.config import Config, config_dict, fill_in, leave_open
from alexnet_flax.errors import UsageError

# Batch -> rate, steps, steps of the warm-up.
_SETTINGS = {8192: (10.0, 15_600, 600), 16_384: (24.0, 7_800, 400), 32_768: (32.0, 4_000, 400)}
_KEYS = ('optimizer.learning_rate', 'total_steps', 'optimizer.warmup_steps')


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/imagenet_lars.py:torchvision."""
  config = config_dict(Config())
  leave_open(config, *_KEYS)
  config.model.variant = arg or 'batchnorm'
  config.model.dtype = 'bfloat16'

  config.data.dataset = 'imagenet2012'
  config.data.eval_split = 'validation'
  config.data.batch_size = 8192
  config.data.eval_batch_size = 1024

  config.optimizer.name = 'lars'
  config.optimizer.schedule = 'polynomial'
  config.optimizer.decay_power = 2.0
  config.optimizer.weight_decay = 5e-4
  return config


def complete(config):
  """Sets what the command line leaves open."""
  batch = config.data.batch_size
  if batch in _SETTINGS:
    fill_in(config, dict(zip(_KEYS, _SETTINGS[batch], strict=True)))
  elif None in (config.optimizer.learning_rate, config.total_steps, config.optimizer.warmup_steps):
    known = ', '.join(map(str, _SETTINGS))
    raise UsageError(f'data.batch_size (={batch}) must be {known}; or state {", ".join(_KEYS)} for it')
