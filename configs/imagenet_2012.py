"""The network and recipe of Krizhevsky, Sutskever and Hinton, as their paper states them.

Section 5: batch 128, momentum 0.9, weight decay 5e-4, learning rate 0.01, divided by ten three times in
roughly 90 epochs. The authors divided it by hand when the validation error stopped improving; the epochs here
(25, 51, 79, and the end at 91) are those of their program (layer-params-145.cfg in
computerhistory/AlexNet-Source-Code). Section 4.1: random 224x224 crops of an image whose short side is 256,
mirroring, and noise along the principal components of RGB. The paper crops from the central 256x256 only.
This recipe does so with the data set that `alexnet-flax prepare imagenet2012 --side 256 --crop center`
writes: --config.data.dataset=imagenet2012_256_center_q90. The paper's ten-crop evaluation is
--config.data.ten_crop=true.
"""

from alexnet_flax.config import Config, config_dict


def get_config(arg: str | None = None):
  """Returns the configuration; `arg` names another variant: --config=configs/imagenet_2012.py:torchvision."""
  config = config_dict(Config())
  config.model.variant = arg or 'paper'

  config.data.dataset = 'imagenet2012'
  config.data.eval_split = 'validation'
  config.data.batch_size = 128
  config.data.crop = 'random_crop'
  config.augment.pca_noise = 0.1

  config.optimizer.learning_rate = 0.01
  config.optimizer.schedule = 'step'
  config.optimizer.boundary_epochs = (25.0, 51.0, 79.0)
  config.optimizer.decay_factor = 0.1
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4
  config.total_epochs = 91.0
  return config
