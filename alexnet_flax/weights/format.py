"""What a format of weights files must provide, and one opened file."""

import contextlib
import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alexnet_flax.errors import UsageError
from alexnet_flax.models.spec import Conv, Dense, Layer, Preprocessing, Spec
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.weights.layout import Tensors, variables_of

Activations = dict[str, np.ndarray]  # layer -> [N, H, W, C] or [N, C]
Dump = Callable[[Tensors, Spec, Sequence[str]], bytes]


class Inputs(NamedTuple):
  """The same images at three stages."""

  images: Sequence[np.ndarray]  # uint8 RGB [H, W, 3] of any sizes
  views: np.ndarray  # uint8 RGB [N, S, S, 3], resized and cropped for the network
  normalized: np.ndarray  # float32 [N, S, S, 3], the network's input


class Parsed(NamedTuple):
  """The content of a weights file, as far as it has it."""

  stored: Any  # the tensors, as the format's own functions take them
  spec: Spec | None = None  # the network
  class_names: tuple[str, ...] = ()
  layers: Sequence[tuple[str, Any]] | None = None  # that compute, (name, description) in order
  image_size: int | None = None  # the side of the network's images
  preprocessing: Preprocessing | None = None  # if the file says that it is not its variant's


@dataclasses.dataclass(frozen=True)
class Format:
  """A format of weights files. Its functions raise UsageError for what they cannot accept."""

  name: str  # with `layer_names`, also the name of that naming scheme
  ending: str  # of its files
  recognize: Callable[[bytes, pathlib.Path], bool]  # whether content, of a file at a path, has this format
  parse: Callable[[bytes], Parsed]  # may raise errors of any kind for a broken file
  read: 'Callable[[WeightsFile, Spec], Tensors]'  # returns checked tensors, by our names
  dump: Dump  # returns a file of tensors, a spec and class names
  nature: str = ''  # of its files, for messages about broken ones: 'written by PyTorch'
  companions: Mapping[str, Dump] = dataclasses.field(
    default_factory=dict
  )  # files beside it, by their endings
  variants: tuple[str, ...] = ()  # that a file which does not contain its spec can be of, most likely first
  describe: Callable[[Spec], Sequence[tuple[str, Any]]] = lambda spec: ()  # as `Parsed.layers` has a file's
  # Returns how many outputs a file has for a layer of a spec; LookupError if it has no such layer.
  outputs: 'Callable[[WeightsFile, Spec, str], int] | None' = None
  layer_names: Callable[[Spec], dict[str, str]] | None = None  # our layers' names -> the program's
  # Runs a file, with its spec, the number of classes and images, in the program that the format comes from;
  # returns the program's name and version, and its activations by our layers' names, 'input' first.
  activations: 'Callable[[WeightsFile, Spec, int, Inputs], tuple[str, Activations]] | None' = None


def lacks_layer(program: str, name: str, layer: Layer, spec: Spec) -> UsageError:
  """Returns the error for a layer that a program does not have, with the formats that hold it."""
  others = 'our .safetensors and .stablehlo hold every network, .onnx all but LRN of even windows'
  return UsageError(f'{program} has no layer like {name} of {spec.name}: {layer}; {others}')


def check_inflated_size(size: int, content: bytes) -> None:
  """Refuses, before they are read, parts of a file that claim to hold far more bytes than the file."""
  if size > 4 * len(content) + 2**30:
    raise UsageError(f'refused: it has {len(content):,} bytes and claims to hold {size:,}')


def open_archive(content: bytes) -> zipfile.ZipFile:
  """Opens a ZIP archive that may be read whole; its `read` compares checksums."""
  archive = zipfile.ZipFile(io.BytesIO(content))
  check_inflated_size(sum(member.file_size for member in archive.infolist()), content)
  return archive


@dataclasses.dataclass(frozen=True)
class WeightsFile:
  """A weights file that has been read, checked against its digest, and parsed; its content as in `Parsed`."""

  source: str  # the path, URL or name that it was opened by
  path: pathlib.Path  # where it lies on this machine
  format: Format
  stored: Any
  spec: Spec | None
  class_names: tuple[str, ...]
  layers: Sequence[tuple[str, Any]] | None
  image_size: int | None
  preprocessing: Preprocessing | None

  def find_spec(self) -> Spec | None:
    """Returns the network that the file contains, or the variant whose layers it has."""
    if self.spec:
      return self.spec
    for name in self.format.variants:
      with contextlib.suppress(UsageError):
        self._check_layers(VARIANTS[name])
        return VARIANTS[name]
    return None

  def scaled(self, spec: Spec, width: float = 1.0, image_size: int | None = None) -> Spec:
    """Returns `spec.scaled(width, image_size)`; what is not given, and preprocessing, as the file has it.

    Raises UsageError for images that are too small for the network.
    """
    if width == 1 and self.format.outputs:
      named = spec.named_layers()
      features, widest = max(
        (layer.features or 0, name) for name, layer in named if isinstance(layer, Conv | Dense)
      )
      with contextlib.suppress(LookupError, ValueError, TypeError, UsageError):  # of another network
        width = self.format.outputs(self, spec, widest) / features or 1.0
    scaled = spec.scaled(width, self.image_size if image_size is None else image_size)
    scaled = dataclasses.replace(scaled, preprocessing=self.preprocessing or spec.preprocessing)
    try:
      scaled.check_image_size(scaled.image_size, scaled.image_size)
    except ValueError as error:
      raise UsageError(f'{self.path}: {error}') from None
    return scaled

  def variables(self, spec: Spec) -> dict[str, Any]:
    """Returns the variables of a network; values and errors as for `load_weights`."""
    self._check_layers(spec)
    return variables_of(self.format.read(self, spec))

  def _check_layers(self, spec: Spec) -> None:
    ours = self.format.describe(spec)
    for (name, layer), (our_name, our_layer) in zip(self.layers or (), ours, strict=False):
      if layer != our_layer:
        difference = f'its layer {name} is {layer}, where {our_name} must be {our_layer}'
        raise UsageError(f'{self.path} is of another network than {spec.name}: {difference}')
    if self.layers is not None and len(self.layers) != len(ours):
      raise UsageError(f'{self.path} has {len(self.layers)} computing layers, {spec.name} has {len(ours)}')
