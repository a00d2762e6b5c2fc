"""PyTorch's `.pth` files, without PyTorch, and without running what they hold.

A `.pth` file is a ZIP archive: a pickle DIR/data.pkl, and the numbers of each storage in DIR/data/KEY. Before
PyTorch 1.6 it was five pickles, and the storages one after the other. The pickle names the functions that
make tensors of storages. Ours are called in their place, and everything else that it names, such as the
`argparse.Namespace` in torchvision's reference checkpoints, becomes an empty object.
"""

import collections
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.weights.format import open_archive

_LEGACY = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e')  # the first of the five pickles
_TYPES: dict[str, Any] = {
  'Float': '<f4', 'Double': '<f8', 'Half': '<f2', 'BFloat16': jnp.bfloat16, 'Byte': 'u1', 'Char': 'i1',
  'Short': '<i2', 'Int': '<i4', 'Long': '<i8', 'Bool': '?',
}  # fmt: skip
_DEPTH = 4  # of dictionaries in dictionaries; one may hold itself
# Under which training programs keep the state dictionary, among other things.
_KEYS = ('state_dict', 'model_state_dict', 'model_state', 'model', 'net', 'network', 'weights')


class _Unread:
  """An object of a class, or a value of a function, that a pickle names; nothing is imported or called."""

  name: str = ''

  def __new__(cls, *_: Any, **__: Any) -> '_Unread':
    return super().__new__(cls)

  def __call__(self, *_: Any) -> '_Unread':
    return self

  def _ignore(self, *_: Any) -> None:
    """Takes what a pickle would put into the object."""

  __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Storage(NamedTuple):
  kind: str  # in _TYPES
  key: str
  size: int


class _Tensor(NamedTuple):
  """A tensor of a storage that has not been read yet; offset and strides count numbers."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Makes dictionaries, lists, numbers, text and tensors, and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    """Returns our own function for a name."""
    match module, name:
      case 'collections', 'OrderedDict':
        return collections.OrderedDict
      case 'torch._utils', '_rebuild_tensor' | '_rebuild_tensor_v2':
        return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
      case 'torch._utils', '_rebuild_parameter' | '_rebuild_parameter_with_state':
        return lambda tensor, *_: tensor
      case 'torch' | 'torch.cuda', _ if name.removesuffix('Storage') in _TYPES:
        return name.removesuffix('Storage')
    return type('Unread', (_Unread,), {'name': f'{module}.{name}'})

  def persistent_load(self, pid: Any) -> _Storage:
    """Returns a storage for ('storage', type, key, device, size)."""
    _, kind, key, _, size = pid[:5]
    return _Storage(kind, str(key), size)


def parse_state_dict(content: bytes) -> dict[str, np.ndarray]:
  """Returns the arrays of the state dictionary in a `.pth` file, by the names that the file has for them.

  Raises UsageError if the file holds no dictionary of dense tensors, and any error if it is damaged.
  """
  loaded, read = (_read_pickles if content.startswith(_LEGACY) else _read_archive)(content)
  for _ in range(_DEPTH):
    if isinstance(loaded, dict):
      inner = (loaded[key] for key in _KEYS if isinstance(loaded.get(key), dict | _Unread))
      loaded = next(inner, loaded)
  if not isinstance(loaded, dict):
    what = loaded.name if isinstance(loaded, _Unread) else type(loaded).__name__
    raise UsageError(f'holds {what}, not a state dictionary; save model.state_dict()')
  return {name: _array(name, tensor, read) for name, tensor in loaded.items()}


def _read_archive(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
  """The pickled object, and a function that reads a storage by its key."""
  archive = open_archive(content)
  folders = [name[: -len('data.pkl')] for name in archive.namelist() if name.endswith('/data.pkl')]
  if len(folders) != 1:
    raise UsageError(f'a ZIP archive with {len(folders)} data.pkl; PyTorch writes one')
  folder = folders[0]
  if f'{folder}byteorder' in archive.namelist():
    _check_byte_order(archive.read(f'{folder}byteorder') == b'little')
  loaded = _Unpickler(io.BytesIO(archive.read(f'{folder}data.pkl')), encoding='latin1').load()
  return loaded, functools.cache(lambda key: archive.read(f'{folder}data/{key}'))


def _check_byte_order(is_little: bool) -> None:
  if not is_little:
    raise UsageError('its numbers are big-endian; save it on a little-endian machine')


def _read_pickles(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
  file, sizes = io.BytesIO(content), {}

  class Unpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> _Storage:
      storage = super().persistent_load(pid)
      sizes[storage.key] = storage.size * np.dtype(_TYPES[storage.kind]).itemsize
      return storage

  _, _, system, loaded, keys = (Unpickler(file, encoding='latin1').load() for _ in range(5))
  _check_byte_order(system['little_endian'])
  stored = {}
  for key in keys:
    file.seek(8, io.SEEK_CUR)  # the size once more
    stored[str(key)] = file.read(sizes[str(key)])
  return loaded, stored.__getitem__


def _array(name: Any, tensor: Any, read: Callable[[str], bytes]) -> np.ndarray:
  if not isinstance(name, str) or not isinstance(tensor, _Tensor | _Unread):
    raise UsageError(f'not a state dictionary: its {name!r} is no tensor; save model.state_dict()')
  if isinstance(tensor, _Unread):  # sparse, quantized
    raise UsageError(f'tensor {name} is not a dense one ({tensor.name}); save it as float32')
  (kind, key, size), offset, shape, strides = tensor
  last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
  if min(size, offset, *shape, *strides) < 0 or math.prod(shape) > size or last >= max(size, 1):
    raise UsageError(f'broken: tensor {name} of shape {shape} does not fit its {size:,} numbers')
  dtype, content = np.dtype(_TYPES[kind]), read(key)
  if len(content) != size * dtype.itemsize:
    raise UsageError(f'broken: tensor {name} is cut short')
  steps = [stride * dtype.itemsize for stride in strides]
  array = np.ndarray(shape, dtype, content, offset * dtype.itemsize, steps)
  return array.astype(np.float32) if dtype == jnp.bfloat16 else array


def dump_state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Returns a `.pth` file of float32 arrays, as `torch.save` writes a state dictionary."""

  def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the protocol's number and the end

  empty, buffer = b'ccollections\nOrderedDict\n)R', io.BytesIO()
  program = b'\x80\x02' + empty + b'('
  with zipfile.ZipFile(buffer, 'w') as archive:
    for key, (name, array) in enumerate(arrays.items()):
      data = np.ascontiguousarray(array, '<f4')
      strides = tuple(stride // data.itemsize for stride in data.strides)
      storage = pickled('storage') + b'ctorch\nFloatStorage\n' + pickled(str(key)) + pickled('cpu')
      tensor = storage + pickled(data.size) + b'tQ' + pickled(0) + pickled(data.shape) + pickled(strides)
      program += pickled(name) + b'ctorch._utils\n_rebuild_tensor_v2\n((' + tensor + b'\x89' + empty + b'tR'
      archive.writestr(f'archive/data/{key}', data.tobytes())
    for member, text in (('data.pkl', program + b'u.'), ('byteorder', b'little'), ('version', b'3\n')):
      archive.writestr(f'archive/{member}', text)
  return buffer.getvalue()
