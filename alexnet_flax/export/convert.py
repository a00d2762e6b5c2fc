"""`alexnet-flax convert`: weights from one program to another, the proof that they are the same; programs."""

import importlib
import math
import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from alexnet_flax.data.images import UnreadableError, evaluation_view, read_image
from alexnet_flax.errors import UsageError
from alexnet_flax.export import parity
from alexnet_flax.export.model_card import write_card
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.pretrained import Trained, load_trained
from alexnet_flax.weights import WRITABLE_ENDINGS, load_weights, recognize, save_weights
from alexnet_flax.weights.download import local_path, stated_digests
from alexnet_flax.weights.layout import tensors_of

TOLERANCE = 1e-4
_PROGRAMS = {
  '.stablehlo': 'alexnet_flax.export.stablehlo',
  '.onnx': 'alexnet_flax.export.onnx',
}
_ENDINGS = (*WRITABLE_ENDINGS, *_PROGRAMS)


def convert(
  source: str,
  destination: str,
  *,
  variant: str | None = None,
  width: float = 1.0,
  image_size: int | None = None,
  names: str | None = None,
  verify: bool = False,
  images: Sequence[str] = (),
) -> bool:
  """Reads weights, writes them, reads them back, and prints what they are.

  Args:
    source: a run's folder, a weights file, a URL or a published name.
    destination: a file whose ending names the format, as `save_weights` has them; or `.stablehlo` or
      `.onnx`, programs from images to logits. A model card is written beside it.
    variant, width, image_size: which network, where the file alone does not tell.
    names: 'torchvision', for safetensors in torchvision's names.
    verify: print, layer by layer, how far the source's own program is from ours on `images`.
    images: files; two photographs that come with scikit-learn if there are none.

  Returns:
    Whether all layers agree within `TOLERANCE`, if that was asked for.

  Raises:
    UsageError: source, destination or images do not allow it.
  """
  shown = _images(images) if verify else []
  if verify and pathlib.Path(source).is_dir():
    raise UsageError(f'{source} is our own: there is no other program to compare with')
  if not pathlib.Path(destination).name.endswith(_ENDINGS):
    raise UsageError(f'{destination}: unknown ending; choose from {", ".join(_ENDINGS)}')
  network = load_trained(source, variant, width, image_size)
  spec, variables = network.spec, network.variables
  if verify:
    path = local_path(source)
    program, errors = parity.compare(path, recognize(path.read_bytes(), path), spec, variables, shown)
  stated = stated_digests(pathlib.Path(destination))
  if stated:
    raise UsageError(
      f'{destination}: a file of this name must have the digest {stated[0]}; choose another, or remove the'
      ' .sha256 beside it'
    )
  written, agreement = _write(pathlib.Path(destination), network, names)
  print(f'{source}: {spec.name}, {network.num_parameters:,} parameters, {spec.image_size}x{spec.image_size}')
  card = pathlib.Path(f'{pathlib.Path(destination)}.md')
  write_card(card, written, network)
  print(f'wrote {" and ".join(map(str, written))}; {agreement}')
  print(f'{card} says what it is')
  if not verify:
    return True
  print(f'{program}, {len(shown)} images, greatest |a - b| / greatest |b|:')
  for name, error in errors.items():
    print(f'  {name:10} {error:.1e}')
  worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
  agrees = errors[worst] <= TOLERANCE  # not so if it is NaN
  print(f'{"the same" if agrees else "NOT the same"} within {TOLERANCE:g}: {errors[worst]:.1e} at {worst}')
  return agrees


def _write(path: pathlib.Path, network: Trained, names: str | None) -> tuple[list[pathlib.Path], str]:
  """Writes the files, reads them again, and says how they agree."""
  spec, variables = network.spec, network.variables
  if path.suffix not in _PROGRAMS:
    written = save_weights(path, spec, variables, names=names, class_names=network.class_names)
    again = tensors_of(load_weights(written[0], spec))
    for name, tensor in tensors_of(variables).items():
      if not np.array_equal(again[name], tensor):
        raise AssertionError(f'{written[0]} does not hold what was written: {name}')
    return written, 'read back, it is the same to the bit'
  if names is not None:
    raise UsageError(f'--names={names}: only for .safetensors, not for {path.suffix}')
  head, images = spec.head, _images(())
  views = np.stack([evaluation_view(image, spec) for image in images])
  (ours,) = feature_batches(network.model, variables, views, [head], batch_size=len(views))
  try:
    program = importlib.import_module(_PROGRAMS[path.suffix])
    with tempfile.TemporaryDirectory(prefix='.partial-', dir=path.parent) as folder:
      files = program.write(pathlib.Path(folder, path.name), spec, variables, network.class_names)
      theirs = program.run(files[0], views)
      difference = float(np.abs(theirs - ours[head]).max() / max(np.abs(ours[head]).max(), 1e-30))
      if not difference <= TOLERANCE:
        raise AssertionError(f'{path} does not compute what it should: its logits differ by {difference:.1e}')
      written = [file.replace(path.with_name(file.name)) for file in files]
  except ModuleNotFoundError as error:
    raise UsageError(f"{path.suffix} needs {error.name}; pip install 'alexnet_flax[onnx]'") from None
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
  return written, f'run on {len(views)} images, its logits differ by {difference:.1e} of the greatest'


def _images(paths: Sequence[str | os.PathLike[str]]) -> list[np.ndarray]:
  if not paths:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images
  return [_read(path) for path in paths]


def _read(path: str | os.PathLike[str]) -> np.ndarray:
  try:
    return read_image(path)
  except UnreadableError as error:
    raise UsageError(f'the image {path} cannot be read: {error}') from None
