"""Weights files, read and written: every format is recognised by its content and checked.

variables = load_weights('alexnet-owt-7be5be79.pth', VARIANTS['torchvision'])
logits = model.apply(variables, images, train=False)
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alexnet_flax.errors import UsageError, needs_extra
from alexnet_flax.files import atomic_path, without_credentials
from alexnet_flax.models.spec import Spec
from alexnet_flax.weights import caffe, keras, native, torchvision
from alexnet_flax.weights.download import check_digests, local_path, stated_digests
from alexnet_flax.weights.format import Format, WeightsFile
from alexnet_flax.weights.layout import check, tensors_of

# In the order in which a file's content is compared; of two with one ending the first writes it.
FORMATS: tuple[Format, ...] = (
  native.NATIVE,
  torchvision.SAFETENSORS,
  keras.KERAS,
  keras.KERAS_WEIGHTS,
  torchvision.PTH,
  caffe.CAFFE,
)
# Whose names of layers there are: {'ours': ..., 'torchvision': ..., 'caffe': ...}.
LAYER_NAMES: dict[str, Callable[[Spec], dict[str, str]]] = {
  format.name: format.layer_names for format in FORMATS if format.layer_names
}
WRITABLE_ENDINGS: tuple[str, ...] = tuple(dict.fromkeys(format.ending for format in FORMATS))


def open_weights(source: str | os.PathLike[str]) -> WeightsFile:
  """Reads a weights file, once: its format, its network, its class names and its tensors.

  `source` is a path, a URL, a name in `PUBLISHED`, or hf:OWNER/NAME[@REVISION]. Raises UsageError if the
  file is absent, broken, unsafe, of no known format or of another digest.
  """
  path = local_path(source)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}') from None
  check_digests(content, stated_digests(path, source), str(path))
  format = next((format for format in FORMATS if format.recognize(content, path)), None)
  if format is None:
    raise UsageError(f'{path}: not a weights file; known are {", ".join(WRITABLE_ENDINGS)}')
  try:
    with needs_extra(f'a {format.ending} file'):
      parsed = format.parse(content)
  except UsageError as error:
    raise UsageError(f'{path}: {error}') from None
  except Exception as error:  # libraries raise errors of any kind for a damaged file
    otherwise = f', or not {format.nature}' if format.nature else ''
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f'{path}: broken{otherwise}: {reason}') from None
  return WeightsFile(without_credentials(os.fspath(source)), path, format, *parsed)


def load_weights(source: str | os.PathLike[str], spec: Spec) -> dict[str, Any]:
  """Returns a network's variables from a weights file.

  The format is recognised by the file's content. If the name ends in -DIGEST.pth, as PyTorch's hub writes it,
  or FILE.sha256 lies beside the file, the file must have that digest.

  Args:
    source: A path, a URL, a name in `PUBLISHED`, or hf:OWNER/NAME[@REVISION] on the Hugging Face Hub; of
      PyTorch's `.pth` (only tensors are read), safetensors in torchvision's names, Caffe's `.caffemodel`,
      Keras's `.keras`, `.h5` and `.weights.h5`, or our own `.safetensors`. Downloads are kept in
      $ALEXNET_FLAX_CACHE, or ~/.cache/alexnet_flax; those from the Hub in its own cache.
    spec: The network. Its preprocessing must be that of the weights, except for the order of the colours:
      another order is met by reversing the input channels of conv1.

  Returns:
    {'params': ..., 'batch_stats': ...} of float32 arrays. The head has the file's number of classes.

  Raises:
    UsageError: The file is absent, broken, unsafe, of another network or another digest, or a tensor is
      missing, superfluous, of a wrong shape or not finite; the message names it.
  """
  return open_weights(source).variables(spec)


def save_weights(
  path: str | os.PathLike[str],
  spec: Spec,
  variables: Mapping[str, Any],
  *,
  names: str | None = None,
  class_names: Sequence[str] = (),
) -> list[pathlib.Path]:
  """Writes a network's variables in the format of the path's ending.

  Args:
    path: `.safetensors` (ours, with the spec inside), `.pth`, `.caffemodel` (a `.prototxt` is written
      beside it), `.weights.h5` or `.keras`.
    spec: The network.
    variables: Its variables.
    names: 'torchvision' for a `.safetensors` file in torchvision's names and layout.
    class_names: The names of the classes; only our own `.safetensors` keeps them.

  Returns:
    The files written.

  Raises:
    UsageError: The ending is unknown, the format has no such layer or no such input, or the variables
      are not the network's.
  """
  path = pathlib.Path(path)
  format = next((format for format in FORMATS if path.name.endswith(format.ending)), None)
  if format is None:
    raise UsageError(f'{path}: unknown ending; choose from {", ".join(WRITABLE_ENDINGS)}')
  if names is not None:
    if names != torchvision.SAFETENSORS.name or format is not native.NATIVE:
      raise UsageError(f"names={names!r}: only 'torchvision', and only for .safetensors")
    format = torchvision.SAFETENSORS
  tensors = check(tensors_of(variables), spec, 'the variables')
  files = {path: format.dump}
  files |= {path.with_suffix(ending): dump for ending, dump in format.companions.items()}
  try:
    with needs_extra(f'a {format.ending} file'), contextlib.ExitStack() as stack:  # all of them, or none
      for file, dump in files.items():
        stack.enter_context(atomic_path(file)).write_bytes(dump(tensors, spec, class_names))
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
  return list(files)
