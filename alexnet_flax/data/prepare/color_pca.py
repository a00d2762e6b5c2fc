"""The principal components of a data set's colours, for the paper's colour noise."""

import dataclasses
import json
import pathlib

import numpy as np

_FILE = 'rgb_components.json'


@dataclasses.dataclass(frozen=True)
class PrincipalComponents:
  """Of the covariance of RGB over all pixels of a training set, RGB being in 0 ... 1.

  Attributes:
    eigenvalues: the variance along each component, greatest first.
    eigenvectors: the components, one a row.
  """

  eigenvalues: tuple[float, ...]
  eigenvectors: tuple[tuple[float, ...], ...]


# As published with facebookarchive/fb.resnet.torch (datasets/imagenet.lua).
IMAGENET = PrincipalComponents(
  eigenvalues=(0.2175, 0.0188, 0.0045),
  eigenvectors=((-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203)),
)


def principal_components(count: int, sums: np.ndarray, products: np.ndarray) -> PrincipalComponents:
  """The components of `count` pixels in 0 ... 255.

  Args:
    count: of pixels.
    sums: [3], of their values.
    products: [3, 3], of the products of each two of their values.
  """
  mean = sums / (255 * count)
  eigenvalues, columns = np.linalg.eigh(products / (255**2 * count) - np.outer(mean, mean))
  vectors = columns.T[::-1]
  return PrincipalComponents(tuple(eigenvalues[::-1].tolist()), tuple(map(tuple, vectors.tolist())))


def write_components(folder: pathlib.Path, components: PrincipalComponents) -> None:
  """Puts them beside a data set's files."""
  (folder / _FILE).write_text(json.dumps(dataclasses.asdict(components), indent=2) + '\n')


def read_components(folder: str, name: str) -> PrincipalComponents | None:
  """Those beside a data set's files, or ImageNet's if it is that by name; else None."""
  path = pathlib.Path(folder, _FILE)
  if path.is_file():
    stored = json.loads(path.read_text())
    return PrincipalComponents(tuple(stored['eigenvalues']), tuple(map(tuple, stored['eigenvectors'])))
  return IMAGENET if name.startswith('imagenet2012') else None
