"""Principal components of a data set's colours, for the paper's colour augmentation."""

import dataclasses
import pathlib

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.files import read_json, write_json

_FILE = 'rgb_components.json'


@dataclasses.dataclass(frozen=True)
class PrincipalComponents:
  """Principal components of the RGB values, in 0 ... 1, of all pixels of a training set."""

  eigenvalues: tuple[float, ...]  # the variance along each component, greatest first
  eigenvectors: tuple[tuple[float, ...], ...]  # the components, one per row


# As published with facebookarchive/fb.resnet.torch (datasets/imagenet.lua).
IMAGENET = PrincipalComponents(
  eigenvalues=(0.2175, 0.0188, 0.0045),
  eigenvectors=((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203)),
)


def principal_components(count: int, sums: np.ndarray, products: np.ndarray) -> PrincipalComponents:
  """Computes the components from the sums, [3], and products, [3, 3], of `count` pixels in 0 ... 255."""
  mean = sums / (255 * count)
  eigenvalues, columns = np.linalg.eigh(products / (255**2 * count) - np.outer(mean, mean))
  vectors = columns.T[::-1]
  return PrincipalComponents(tuple(eigenvalues[::-1].tolist()), tuple(map(tuple, vectors.tolist())))


def write_components(folder: pathlib.Path, components: PrincipalComponents) -> None:
  """Writes the components into a data set's folder."""
  write_json(folder / _FILE, dataclasses.asdict(components))


def read_components(folder: str, name: str) -> PrincipalComponents | None:
  """Reads the components from a data set's folder; for ImageNet, falls back to the published ones.

  Raises UsageError if their file is damaged.
  """
  path = pathlib.Path(folder, _FILE)
  if path.is_file():
    try:
      stored = read_json(path) or {}
      return PrincipalComponents(tuple(stored['eigenvalues']), tuple(map(tuple, stored['eigenvectors'])))
    except (UsageError, TypeError, KeyError):
      raise UsageError(f'{path} is damaged; remove {folder} and prepare the data set again') from None
  return IMAGENET if name.startswith('imagenet2012') else None
