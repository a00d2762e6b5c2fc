"""AlexNet in JAX and Flax linen: the whole family, as data.

    from alexnet_flax import AlexNet, VARIANTS
    model = AlexNet(VARIANTS['torchvision'], num_classes=1000)

The public names stand in `__init__.pyi` and are imported at their first use. Core dependencies are enough for
all but `train`, which needs the extra of that name.
"""

import importlib.metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ['__version__', 'train']
__version__ = importlib.metadata.version('alexnet_flax')


def train(config, workdir, callbacks=()):
  """Trains; see `alexnet_flax.training.train.train`. The call imports the extra `train`."""
  from alexnet_flax.errors import needs_extra

  with needs_extra('alexnet_flax.train'):
    from alexnet_flax.training import train as training
  return training.train(config, workdir, callbacks)
