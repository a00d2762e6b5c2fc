"""All variants of AlexNet, by name.

Each variant states its origin in `source` and beside its definition. `docs/family.md`, which is generated
from the specs, compares them.
"""

from alexnet_flax.models.spec import Spec
from alexnet_flax.models.variants import batchnorm, caffe, krizhevsky, ports

VARIANTS: dict[str, Spec] = {
  spec.name: spec
  for spec in (
    batchnorm.batchnorm(),
    batchnorm.batchnorm_prose(),
    krizhevsky.paper(),
    krizhevsky.original_code(),
    caffe.caffe(),
    caffe.caffenet(),
    krizhevsky.one_weird_trick(),
    ports.torchvision(),
    caffe.batchnorm_grouped(),
    ports.ungrouped(),
    krizhevsky.cifar10_full(),
  )
}
