"""torchvision's state dictionaries: `.pth`, and `.safetensors` in torchvision's names.

torchvision numbers the layers of two `Sequential`s: features.0.weight, ..., classifier.6.bias. The
same rule names any network without norms; torchvision's own has the names of the spec `torchvision`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Activation, Conv, Dense, Dropout, Flatten, Pool, Preprocessing, Spec
from alexnet_flax.weights import layout
from alexnet_flax.weights.format import Activations, Format, Inputs, Parsed, WeightsFile, lacks_layer
from alexnet_flax.weights.layout import Tensors, check, from_channels_first, match_input, pick, weight_layers
from alexnet_flax.weights.native import is_safetensors, parse_safetensors
from alexnet_flax.weights.others import refuse_others
from alexnet_flax.weights.pth import dump_state_dict, parse_state_dict

PREPROCESSING = Preprocessing()  # torchvision's weights are all for its ImageNet mean and std
# DataParallel's (around the whole network or its parts), torch.compile's, and common names of attributes.
_WRAPPERS = ('module', '_orig_mod', 'model', 'net', 'network', 'backbone', 'alexnet')


def layer_names(spec: Spec) -> dict[str, str]:
  """Our layers' names -> torchvision's, {'conv1': 'features.0', ...}; UsageError if it has no such layer."""
  names, part, number = {}, 'features', 0
  for name, layer in spec.named_layers():
    match layer:
      case Flatten():
        names[name] = 'flatten'  # a function in torchvision, not a module
        part, number = 'classifier', 0
      case Conv(local=False) | Dense() | Activation() | Pool(kind='max' | 'avg') | Dropout():
        names[name] = f'{part}.{number}'
        number += 1
      case _:
        raise lacks_layer("torchvision's AlexNet", name, layer, spec)
  return names


def tensor_names(spec: Spec) -> dict[str, str]:
  """Our tensors' names -> torchvision's, in the order of torchvision's state dictionary."""
  names = layer_names(spec)
  return {
    f'params/{layer}/{ours}': f'{names[layer]}.{theirs}'
    for layer in weight_layers(spec)
    for ours, theirs in (('kernel', 'weight'), ('bias', 'bias'))
  }


def read(file: WeightsFile, spec: Spec) -> Tensors:
  """The tensors of a file in torchvision's names and layout."""
  names, source = tensor_names(spec), str(file.path)
  picked = pick(file.stored, names, source)
  tensors = {name: from_channels_first(name, array, spec) for name, array in picked.items()}
  return match_input(check(tensors, spec, source, names), spec, PREPROCESSING, source)


def to_state_dict(tensors: Tensors, spec: Spec) -> dict[str, np.ndarray]:
  """Tensors in torchvision's names and layout."""
  names = tensor_names(spec)
  tensors = match_input(tensors, spec, PREPROCESSING, "torchvision's layout")
  return {theirs: layout.to_channels_first(ours, tensors[ours], spec) for ours, theirs in names.items()}


def activations(file: WeightsFile, spec: Spec, num_classes: int, inputs: Inputs) -> tuple[str, Activations]:
  """torchvision's own network and its own transforms."""
  import torch
  import torchvision
  from PIL import Image

  model = torchvision.models.alexnet(num_classes=num_classes)
  try:
    model.load_state_dict({name: torch.tensor(value) for name, value in file.stored.items()})
  except RuntimeError as error:
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f'{file.path} does not fit torchvision.models.alexnet: {reason}') from None
  preset = torchvision.transforms._presets.ImageClassification(
    crop_size=spec.image_size, resize_size=round(spec.image_size / spec.preprocessing.center_crop_share)
  )
  images = torch.stack([preset(Image.fromarray(image)) for image in inputs.images])
  program = f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}'
  return program, {'input': layout.channels_last(images), **torch_taps(model, spec, images)}


def torch_taps(model: Any, spec: Spec, images: Any) -> Activations:
  """The output of every module of a PyTorch network in torchvision's names, by our layers' names."""
  import torch

  taps: Activations = {}
  ours_by_theirs = {theirs: ours for ours, theirs in layer_names(spec).items()}  # flattening is no module
  for name, module in model.named_modules():
    if ours := ours_by_theirs.get(name):
      if hasattr(module, 'inplace'):
        module.inplace = False  # or it would overwrite the output of the module before it
      module.register_forward_hook(
        lambda _, __, out, ours=ours: taps.__setitem__(ours, layout.channels_last(out))
      )
  with torch.inference_mode():
    model.eval()(images)
  vectors = [name for name, tap in taps.items() if tap.ndim == 2]
  dense = next(name for name in vectors if name in weight_layers(spec))
  for name in vectors[: vectors.index(dense)]:  # flattened, but not yet mixed: C, H, W as fc6's kernel
    taps[name] = from_channels_first(f'params/{dense}/kernel', taps[name], spec).T
  return taps


def _unwrapped(state_dict: Mapping[str, np.ndarray]) -> Parsed:
  """The state dictionary without the names of modules that training programs wrap around a network."""
  names = {name: '.'.join(part for part in name.split('.') if part not in _WRAPPERS) for name in state_dict}
  names.pop('n_averaged', None)  # AveragedModel's counter
  by_inner = {inner: name for name, inner in names.items()}
  for name, inner in names.items():
    if by_inner[inner] != name:
      raise UsageError(f'holds two networks: {name} and {by_inner[inner]}; save one of them')
  refuse_others(by_inner)
  return Parsed({inner: state_dict[name] for name, inner in names.items()})


SAFETENSORS: Format = Format(
  name='torchvision',
  ending='.safetensors',
  recognize=lambda content, path: is_safetensors(content),
  parse=lambda content: _unwrapped(parse_safetensors(content)),
  read=read,
  dump=lambda tensors, spec, class_names: save(to_state_dict(tensors, spec), metadata={'format': 'pt'}),
  variants=('torchvision',),
  outputs=lambda file, spec, layer: len(file.stored[tensor_names(spec)[f'params/{layer}/bias']]),
  layer_names=layer_names,
  activations=activations,
)
PTH: Format = dataclasses.replace(
  SAFETENSORS,
  name='torch',
  ending='.pth',
  # PyTorch writes a zip archive, formerly a pickle.
  recognize=lambda content, path: (
    content.startswith((b'PK\x03\x04', b'\x80')) or path.name.endswith(('.pth', '.pt', '.pth.tar'))
  ),
  nature='written by PyTorch',
  parse=lambda content: _unwrapped(parse_state_dict(content)),
  dump=lambda tensors, spec, class_names: dump_state_dict(to_state_dict(tensors, spec)),
  layer_names=None,
)
