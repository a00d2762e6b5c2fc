"""torchvision's state dictionaries: `.pth`, and `.safetensors` in torchvision's names.

torchvision numbers the layers of two `Sequential`s: features.0.weight, ..., classifier.6.bias. The
same rule names any network without norms; torchvision's own has the names of the spec `torchvision`.
"""

import io
import pathlib
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import (
  Activation,
  Conv,
  Dense,
  Dropout,
  Flatten,
  Pool,
  Preprocessing,
  Spec,
)
from alexnet_flax.weights.layout import (
  Tensors,
  check,
  from_channels_first,
  match_input,
  pick,
  to_channels_first,
  weight_layers,
)

PREPROCESSING = Preprocessing()  # torchvision's weights are all for its ImageNet mean and std
_LEAVES = {'kernel': 'weight', 'bias': 'bias'}


def layer_names(spec: Spec) -> dict[str, str]:
  """Our layers' names -> torchvision's: {'conv1': 'features.0', 'relu1': 'features.1', ...}.

  Raises:
    UsageError: the network has a layer that torchvision's has no kind of.
  """
  names, part, number = {}, 'features', 0
  for name, layer in spec.named_layers():
    if isinstance(layer, Flatten):
      names[name] = 'flatten'  # a function in torchvision, not a module
      part, number = 'classifier', 0
      continue
    if not isinstance(layer, Conv | Dense | Activation | Pool | Dropout):
      raise UsageError(f"torchvision's AlexNet has no layer as {name} of {spec.name}")
    names[name] = f'{part}.{number}'
    number += 1
  return names


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> torchvision's, in the order of torchvision's state dictionary."""
  names = layer_names(spec)
  return {
    f'params/{layer}/{ours}': f'{names[layer]}.{theirs}'
    for layer in weight_layers(spec)
    for ours, theirs in _LEAVES.items()
  }


def from_state_dict(state_dict: Mapping[str, np.ndarray], spec: Spec, source: str) -> Tensors:
  """Our tensors from arrays in torchvision's names and layout."""
  names = tensor_names(spec)
  stored = {name.removeprefix('module.'): array for name, array in state_dict.items()}  # DataParallel's
  picked = pick(stored, names, source)
  tensors = {name: from_channels_first(name, array, spec) for name, array in picked.items()}
  return match_input(check(tensors, spec, source, names), spec, PREPROCESSING, source)


def to_state_dict(tensors: Tensors, spec: Spec) -> dict[str, np.ndarray]:
  """The reverse of `from_state_dict`."""
  tensors = match_input(tensors, spec, PREPROCESSING, "torchvision's layout")
  return {theirs: to_channels_first(ours, tensors[ours], spec) for ours, theirs in tensor_names(spec).items()}


def read_pth(content: bytes, source: str) -> dict[str, np.ndarray]:
  """The state dictionary in a `.pth` file, by PyTorch's safe loader: tensors only, no code is run.

  Raises:
    UsageError: PyTorch is not installed, or the file is broken, or holds more than tensors.
  """
  torch = _torch()
  try:
    with warnings.catch_warnings():  # of a file that PyTorch did not write; it is refused below
      warnings.simplefilter('ignore', UserWarning)
      loaded = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    reason = ' '.join(str(error).split())
    unsafe = 'Weights only load failed' in reason and 'GLOBAL' in reason
    why = 'refused, for it holds code, not only tensors' if unsafe else 'broken, or not a state dictionary'
    raise UsageError(f'{source}: {why}; save model.state_dict() alone') from None
  except Exception as error:  # PyTorch's loader raises what it likes at a broken file
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise UsageError(f'{source}: broken: {reason}') from None
  for key in ('state_dict', 'model'):
    if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
      loaded = loaded[key]
  if not isinstance(loaded, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
  ):
    raise UsageError(f'{source}: not a state dictionary; save model.state_dict()')
  return {name: _numpy(name, value, torch, source) for name, value in loaded.items()}


def write_pth(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes a state dictionary that `torchvision.models.alexnet().load_state_dict` takes."""
  torch = _torch()
  # Copies: PyTorch warns of arrays that cannot be written to, as JAX's cannot.
  state_dict = {name: torch.tensor(array) for name, array in to_state_dict(tensors, spec).items()}
  buffer = io.BytesIO()
  torch.save(state_dict, buffer)  # to a path it would raise errors of its own
  path.write_bytes(buffer.getvalue())


def write_safetensors(tensors: Tensors, spec: Spec, path: pathlib.Path) -> None:
  """Writes the same arrays as safetensors, with torchvision's names."""
  path.write_bytes(save(to_state_dict(tensors, spec), metadata={'format': 'pt'}))


def _numpy(name: str, tensor: Any, torch: Any, source: str) -> np.ndarray:
  if tensor.layout != torch.strided or tensor.is_quantized:
    raise UsageError(f'{source}: tensor {name} is not a dense one; save it as float32')
  return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _torch() -> Any:
  try:
    import torch
  except ImportError:
    raise UsageError(
      ".pth files need PyTorch: pip install 'alexnet_flax[torch]', or use .safetensors"
    ) from None
  return torch
