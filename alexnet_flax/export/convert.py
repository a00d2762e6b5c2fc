"""`alexnet-flax convert`: weights from one program's format to another's, verified; networks as programs."""

import importlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from alexnet_flax.data.images import UnreadableError, evaluation_view, read_image
from alexnet_flax.errors import UsageError, needs_extra, shown
from alexnet_flax.export import parity
from alexnet_flax.export.model_card import write_card
from alexnet_flax.files import check_writable, expanded, move_into_place, partial_folder
from alexnet_flax.models.spec import Activation, Pool
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.pretrained import PretrainedModel, find_run, load_pretrained
from alexnet_flax.weights import WRITABLE_ENDINGS, open_weights, save_weights
from alexnet_flax.weights.download import stated_digests
from alexnet_flax.weights.format import WeightsFile
from alexnet_flax.weights.layout import tensors_of

TOLERANCE = 1e-4
# Modules that export networks as programs from images to logits. `write` returns the files written, the
# program first; `run` returns the logits of a written program. See `stablehlo` for their arguments.
_PROGRAMS = {'.stablehlo': 'alexnet_flax.export.stablehlo', '.onnx': 'alexnet_flax.export.onnx'}
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
    source: A run's folder, a weights file, a URL or a published name.
    destination: A file whose ending names the format, as for `save_weights`; or `.stablehlo` or
      `.onnx`, programs from images to logits. A model card is written beside it.
    variant, width, image_size: The network, as for `load_pretrained`.
    names: 'torchvision', for safetensors in torchvision's names.
    verify: Print, layer by layer, how far the source's own program is from ours on `images`.
    images: Files; two photographs that come with scikit-learn if there are none.

  Returns:
    Whether all layers agree within `TOLERANCE`; True if not verified.

  Raises:
    UsageError: Source, destination or images do not allow it.
  """
  path, is_run = expanded(destination), find_run(source) is not None
  if verify and is_run:
    raise UsageError(f'{source} is our own: there is no other program to compare with')
  if not path.name.endswith(_ENDINGS):
    raise UsageError(f'{destination}: unknown ending; choose from {", ".join(_ENDINGS)}')
  if names is not None and path.suffix != '.safetensors':
    raise UsageError(f'--names={names}: only for .safetensors, not for {path.suffix}')
  if stated := stated_digests(path):
    advice = 'choose another, or remove the .sha256 beside it'
    raise UsageError(f'{destination}: a file of this name must have the digest {stated[0]}; {advice}')
  check_writable(path)
  drawn = _images(images) if verify else []
  file = source if is_run else open_weights(source)
  if verify and isinstance(file, WeightsFile) and file.format.activations is None:
    raise UsageError(f'{file.path} is our own file: there is no other program to compare with')
  network = load_pretrained(file, variant=variant, width=width, image_size=image_size)
  spec = network.spec
  other = file if verify and isinstance(file, WeightsFile) else None
  del file  # or its tensors would stay in memory beside the network's
  try:  # Writing refuses what the format cannot hold; nothing gets its name before all is done.
    with partial_folder(path) as folder:
      files, agreement = _write(folder / path.name, network, names)
      if other is not None:
        program, errors = parity.compare(other, spec, network.variables, drawn)
      card = folder / f'{path.name}.md'
      write_card(card, files, network)
      for whole in (*files, card):
        check_writable(path.with_name(whole.name))
      for whole in (*files, card):
        move_into_place(whole, path.with_name(whole.name))
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
  size = f'{spec.image_size}x{spec.image_size}'
  print(f'{network.source}: {spec.name}, {network.num_parameters:,} parameters, {size}')
  *written, card = (path.with_name(whole.name) for whole in (*files, card))
  print(shown(f'wrote {" and ".join(map(str, written))}; {agreement}\n{card} describes it'))
  if other is None:
    return True
  print(f'{program}, {len(drawn)} images, greatest |a - b| / greatest |b|:')
  for name, greatest in errors.items():
    print(f'  {name:10} {greatest:.1e}')
  worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
  agrees = errors[worst] <= TOLERANCE  # False for NaN
  print(f'{"the same" if agrees else "NOT the same"} within {TOLERANCE:g}: {errors[worst]:.1e} at {worst}')
  return agrees


def _write(path: pathlib.Path, network: PretrainedModel, names: str | None) -> tuple[list[pathlib.Path], str]:
  """Writes the files, reads them back, and says how well they agree."""
  spec, variables = network.spec, network.variables
  if path.suffix not in _PROGRAMS:
    written = save_weights(path, spec, variables, names=names, class_names=network.class_names)
    file = open_weights(written[0])
    again = tensors_of(file.variables(spec))
    for name, tensor in tensors_of(variables).items():
      if not np.array_equal(again[name], tensor):
        raise AssertionError(f'{written[0]} does not hold what was written: {name}')
    usual, said = VARIANTS.get(spec.name, spec), 'read back, it is the same to the bit'
    share, theirs = (one.preprocessing.center_crop_share for one in (spec, usual))
    if file.spec is None and share != theirs:
      said += (
        f'; but who reads it crops {theirs:.1%} of the short side, as {spec.name} does, and not {share:.1%}'
      )
    if file.layers is None:  # weights alone
      kinds = (one for one in dict.fromkeys(spec.layers) if isinstance(one, Activation | Pool))
      if unsaid := [str(one) for one in kinds if one not in usual.layers]:
        said += f'; but it does not say {", ".join(unsaid)}, which {spec.name} lacks'
    return written, said
  with needs_extra(path.suffix):
    program = importlib.import_module(_PROGRAMS[path.suffix])
    written = program.write(path, spec, variables, network.class_names)
    views = np.stack([evaluation_view(image, spec) for image in _images(())])
    theirs = program.run(written[0], views)
  difference = parity.greatest_error(theirs, network.logits(views))
  if not difference <= TOLERANCE:
    raise AssertionError(f'{path} does not compute what it should: its logits differ by {difference:.1e}')
  return written, f'run on {len(views)} images, its logits differ by {difference:.1e} of the greatest'


def _images(paths: Sequence[str]) -> list[np.ndarray]:
  if not paths:
    with needs_extra('convert without --images'):
      from sklearn.datasets import load_sample_images
    return load_sample_images().images
  images = []
  for path in paths:
    try:
      images.append(read_image(path))
    except UnreadableError as error:
      raise UsageError(f'the image {path} cannot be read: {error}') from None
  return images
