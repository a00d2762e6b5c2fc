"""`alexnet-flax convert`: weights from one program to another, and the proof that they are the same."""

import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from alexnet_flax import parity
from alexnet_flax.errors import UsageError
from alexnet_flax.pictures import UnreadableError, read_picture
from alexnet_flax.pretrained import load_variant
from alexnet_flax.weights import load_weights, recognize, save_weights
from alexnet_flax.weights.download import local_path, stated_digests
from alexnet_flax.weights.layout import tensors_of

TOLERANCE = 1e-4


def convert(
  source: str,
  destination: str,
  *,
  variant: str | None = None,
  width: float = 1.0,
  image_size: int | None = None,
  names: str | None = None,
  verify: bool = False,
  pictures: Sequence[str] = (),
) -> bool:
  """Reads weights, writes them, reads them back, and prints what they are.

  Args:
    source: a run's folder, a weights file, a URL or a published name.
    destination: a file whose ending names the format, as `save_weights` has them.
    variant, width, image_size: which network, where the file alone does not tell.
    names: 'torchvision', for safetensors in torchvision's names.
    verify: print, layer by layer, how far the source's own program is from ours on `pictures`.
    pictures: files; two photographs that come with scikit-learn if there are none.

  Returns:
    Whether all layers agree within `TOLERANCE`, if that was asked for.

  Raises:
    UsageError: source, destination or pictures do not allow it; nothing is written then.
  """
  shown = _pictures(pictures) if verify else []
  if verify and pathlib.Path(source).is_dir():
    raise UsageError(f'{source} is our own: there is no other program to compare with')
  spec, variables = load_variant(source, variant, width, image_size)
  tensors = tensors_of(variables)
  if verify:
    path = local_path(source)
    program, errors = parity.compare(path, recognize(path.read_bytes(), path), spec, variables, shown)
  stated = stated_digests(pathlib.Path(destination))
  if stated:
    raise UsageError(
      f'{destination}: a file of this name must have the digest {stated[0]}; choose another, or remove the'
      ' .sha256 beside it'
    )
  written = save_weights(destination, spec, variables, names=names)
  again = tensors_of(load_weights(written[0], spec))
  if any(not np.array_equal(again[name], tensor) for name, tensor in tensors.items()):
    raise AssertionError(f'{written[0]} does not hold what was written')
  parameters = sum(tensor.size for name, tensor in tensors.items() if name.startswith('params/'))
  print(f'{source}: {spec.name}, {parameters:,} parameters, {spec.image_size}x{spec.image_size}')
  print(f'wrote {" and ".join(map(str, written))}; read back, it is the same to the bit')
  if not verify:
    return True
  print(f'{program}, {len(shown)} pictures, greatest |a - b| / greatest |b|:')
  for name, error in errors.items():
    print(f'  {name:10} {error:.1e}')
  worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
  agrees = errors[worst] <= TOLERANCE  # not so if it is NaN
  print(f'{"the same" if agrees else "NOT the same"} within {TOLERANCE:g}: {errors[worst]:.1e} at {worst}')
  return agrees


def _pictures(paths: Sequence[str | os.PathLike[str]]) -> list[np.ndarray]:
  if not paths:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images
  return [_read(path) for path in paths]


def _read(path: str | os.PathLike[str]) -> np.ndarray:
  try:
    return read_picture(path)
  except UnreadableError as error:
    raise UsageError(f'the picture {path} cannot be read: {error}') from None
