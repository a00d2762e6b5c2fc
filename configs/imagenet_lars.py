"""AlexNet with batch normalization on ImageNet in batches of 8,192 to 32,768, by LARS (You et al. 2017).

Rates, steps and warm-up are those of NVIDIA/caffe's models/alexnet_bn, whose network has other norms than
ours, whose optimizer clips ("LARC"), and whose warm-up begins at a rate of 1, ours at 0. With
`--config.mesh.model=8`, eight devices share the fully connected layers. We have not run this recipe.
"""

from alexnet_flax.config import Config, config_dict
from alexnet_flax.errors import unknown_name

# Batch -> rate, steps, steps of the warm-up.
SETTINGS = {'8192': (10.0, 15_600, 600), '16384': (24.0, 7_800, 400), '32768': (32.0, 4_000, 400)}


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` is the batch: --config=configs/imagenet_lars.py:16384."""
  batch = arg or '8192'
  if batch not in SETTINGS:
    raise unknown_name('batch', batch, SETTINGS)
  rate, steps, warmup = SETTINGS[batch]
  config = config_dict(Config())
  config.model.variant = 'batchnorm'
  config.model.dtype = 'bfloat16'

  config.data.dataset = 'imagenet2012'
  config.data.eval_split = 'validation'
  config.data.batch_size = int(batch)
  config.data.eval_batch_size = 1024

  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = rate
  config.optimizer.schedule = 'polynomial'
  config.optimizer.decay_power = 2.0
  config.optimizer.warmup_steps = warmup
  config.optimizer.weight_decay = 5e-4
  config.total_steps = steps
  return config
