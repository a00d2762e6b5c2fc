"""Weights in and out: every format by its content, checked before anything is made of it.

variables = load_weights('alexnet-owt-7be5be79.pth', VARIANTS['torchvision'])
logits = model.apply(variables, images, train=False)
"""

import contextlib
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors
import safetensors.numpy

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Spec
from alexnet_flax.weights import caffe, caffe_network, keras, native, torchvision
from alexnet_flax.weights.download import local_path, verify_digest
from alexnet_flax.weights.layout import Tensors, check, tensors_of, variables_of

_WRITERS = {
  '.safetensors': native.write,
  '.pth': torchvision.write_pth,
  '.caffemodel': caffe.write,
  '.weights.h5': keras.write,
  '.keras': keras.write_keras,
}

WRITABLE_ENDINGS = tuple(_WRITERS)


def load_weights(source: str | os.PathLike[str], spec: Spec) -> dict[str, Any]:
  """A network's variables from a weights file.

  The format is recognised by the file's content: PyTorch's `.pth` (tensors alone; needs PyTorch) and
  safetensors in torchvision's names, Caffe's `.caffemodel`, Keras's `.weights.h5` and `.keras`, and our
  own `.safetensors`. If the name ends in -DIGEST, as PyTorch's hub writes it, or FILE.sha256 lies
  beside the file, the file must have that digest.

  Args:
    source: a path, a URL, or a name in `PUBLISHED`. What is downloaded is kept in
      $ALEXNET_FLAX_CACHE, or ~/.cache/alexnet_flax.
    spec: the network. Its preprocessing must be that of the weights, but for the order of the colours,
      which is met by turning conv1 around.

  Returns:
    {'params': ..., 'batch_stats': ...} of float32 arrays. The head has the file's number of classes.

  Raises:
    UsageError: the file is absent, broken, unsafe, of another network or another digest, or a tensor is
      missing, superfluous, of a wrong shape or not finite; the message names it.
  """
  path = local_path(source)
  content = _read(path)
  verify_digest(source, path, content)
  return variables_of(_tensors(content, path, spec))


def save_weights(
  path: str | os.PathLike[str],
  spec: Spec,
  variables: Mapping[str, Any],
  *,
  names: str | None = None,
  class_names: Sequence[str] = (),
) -> list[pathlib.Path]:
  """Writes a network's variables in the format that the path's ending names.

  Args:
    path: `.safetensors` (ours, with the spec inside), `.pth`, `.caffemodel` (a `.prototxt` is written
      beside it), `.weights.h5` or `.keras`.
    spec: the network.
    variables: its variables.
    names: 'torchvision' for a `.safetensors` file in torchvision's names and layout.
    class_names: of the logits, kept in our own `.safetensors` alone.

  Returns:
    The files written.

  Raises:
    UsageError: the ending is unknown, the format has no such layer or no such input, or the variables
      are not the network's.
  """
  path = pathlib.Path(path)
  ending = next((ending for ending in _WRITERS if path.name.endswith(ending)), None)
  if ending is None:
    raise UsageError(f'{path}: unknown ending; choose from {", ".join(_WRITERS)}')
  if names not in (None, 'torchvision') or (names and ending != '.safetensors'):
    raise UsageError(f"names={names!r}: only 'torchvision', and only for .safetensors")
  write = torchvision.write_safetensors if names else _WRITERS[ending]
  if write is native.write:
    write = functools.partial(native.write, class_names=class_names)
  tensors = check(tensors_of(variables), spec, 'the variables')
  partial = path.with_name(f'.partial-{os.getpid()}-{path.name}')
  try:
    write(tensors, spec, partial)
    partial.replace(path)
  except OSError as error:
    raise UsageError(f'cannot write {path}: {error.strerror or error}') from None
  finally:
    partial.unlink(missing_ok=True)
  if ending != '.caffemodel':
    return [path]
  text = path.with_suffix('.prototxt')
  caffe_network.write_prototxt(spec, tensors[f'params/{spec.head}/bias'].shape[0], text)
  return [path, text]


def stored_spec(source: str | os.PathLike[str], candidates: Mapping[str, Spec]) -> Spec | None:
  """The network of a weights file: the spec inside our own; else the one of the candidates it can be of."""
  path = local_path(source)
  content = _read(path)
  kind = recognize(content, path)
  if kind == 'native':
    return native.stored_spec(_safetensors_metadata(content, path), str(path))
  if kind == 'caffe':
    known = [candidates[name] for name in ('caffe', 'caffenet', 'batchnorm_grouped') if name in candidates]
    return caffe.stored_variant(content, str(path), known)
  return candidates.get('batchnorm' if kind == 'keras' else 'torchvision')


def stored_class_names(source: str | os.PathLike[str]) -> tuple[str, ...]:
  """The names of the classes inside one of our own files; none of any other file."""
  path = local_path(source)
  content = _read(path)
  if recognize(content, path) != 'native':
    return ()
  return native.stored_class_names(_safetensors_metadata(content, path), str(path))


def recognize(content: bytes, path: pathlib.Path) -> str:
  """The format: 'native', 'torchvision' (safetensors), 'torch' (.pth), 'keras' or 'caffe'."""
  if content[:4] == b'PK\x03\x04':
    with _broken(path), zipfile.ZipFile(path) as archive:
      members = archive.namelist()
    return 'keras' if 'model.weights.h5' in members else 'torch'
  if content[:8] == b'\x89HDF\r\n\x1a\n':
    return 'keras'
  if content[8:9] == b'{':
    return 'native' if _safetensors_metadata(content, path).get('format') == native.FORMAT else 'torchvision'
  if content[:1] == b'\x80' or path.name.endswith(('.pth', '.pt')):  # a pickle begins so
    return 'torch'
  if path.name.endswith('.caffemodel'):
    return 'caffe'
  raise UsageError(
    f'{path}: not a weights file; known are .safetensors, .pth, .caffemodel, .weights.h5 and .keras'
  )


def _tensors(content: bytes, path: pathlib.Path, spec: Spec) -> Tensors:
  source = str(path)
  match recognize(content, path):
    case 'native':
      metadata = _safetensors_metadata(content, path)
      return native.read(_safetensors(content, path), metadata, spec, source)
    case 'torchvision':
      return torchvision.from_state_dict(_safetensors(content, path), spec, source)
    case 'torch':
      return torchvision.from_state_dict(torchvision.read_pth(content, source), spec, source)
    case 'keras':
      return keras.read(content, spec, source)
    case _:
      return caffe.read(content, spec, source)


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise UsageError(f'cannot read {path}: {error.strerror}') from None


def _safetensors(content: bytes, path: pathlib.Path) -> Tensors:
  with _broken(path):
    try:
      return safetensors.numpy.load(content)
    except KeyError as error:  # a type that NumPy lacks
      raise ValueError(f'it holds {error.args[0]}; save its tensors as float32') from None


def _safetensors_metadata(content: bytes, path: pathlib.Path) -> dict[str, str]:
  with _broken(path):  # the length of a JSON object, and the object (safetensors' documentation)
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')]).get('__metadata__') or {}


@contextlib.contextmanager
def _broken(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except (safetensors.SafetensorError, zipfile.BadZipFile, ValueError, KeyError, AttributeError) as error:
    raise UsageError(f'{path}: broken: {" ".join(str(error).split())}') from None
