"""All variants of AlexNet, by name.

Each variant states its origin in `source` and beside its definition. `docs/family.md`, which is generated
from the specs, compares them.
"""

from alexnet_flax.errors import unknown_name
from alexnet_flax.models.spec import Conv, Spec
from alexnet_flax.models.variants import batchnorm, caffe, krizhevsky, ports


class _Variants(dict[str, Spec]):
  """Names the nearest for a name that is not there; its repr is a table."""

  def __missing__(self, name: str) -> Spec:
    raise unknown_name('variant', name, self)

  def __repr__(self) -> str:
    rows = [('variant', 'image', 'channels', 'norms')]
    for name, spec in self.items():
      channels = ' '.join(str(layer.features) for layer in spec.layers if isinstance(layer, Conv))
      norms = dict.fromkeys(kind for layer in spec.layers if (kind := type(layer).__name__).endswith('Norm'))
      rows.append((name, str(spec.image_size), channels, ' '.join(norms)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


VARIANTS: dict[str, Spec] = _Variants(
  (spec.name, spec)
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
    krizhevsky.cifar10_80sec(),
    krizhevsky.cifar10_four_convs(),
    krizhevsky.cifar10_local(),
    krizhevsky.cifar10_local_lrn(),
    ports.cifar10_alexnet(),
    ports.cifar10_small_alexnet(),
  )
)
