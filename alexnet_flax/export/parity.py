"""The same weights in the program they came from: its activations, layer by layer, beside ours.

PyTorch, Keras and OpenCV are imported where they are needed, and are not required otherwise.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_flax.data.augment import normalize
from alexnet_flax.data.images import evaluation_view
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.features import features
from alexnet_flax.models.alexnet import AlexNet
from alexnet_flax.models.spec import Dropout, Spec
from alexnet_flax.weights import caffe_network, torchvision
from alexnet_flax.weights import keras as keras_network
from alexnet_flax.weights.layout import from_channels_first, weight_layers

Activations = dict[str, np.ndarray]


def greatest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The greatest |a - b| over the greatest |b|."""
  scale = float(np.abs(theirs).max())
  return float(np.abs(ours - theirs).max()) / (scale or 1.0)


def compare(
  path: pathlib.Path, kind: str, spec: Spec, variables: Any, images: Sequence[np.ndarray]
) -> tuple[str, dict[str, float]]:
  """The greatest error of every layer, and of the input, against the file's own program.

  Args:
    path: the weights file.
    kind: its format, as `weights.recognize` says.
    spec: the network.
    variables: what was loaded of the file.
    images: uint8 RGB [H, W, 3], of any sizes.

  Returns:
    The other program with its version, and layer -> error, 'input' first.

  Raises:
    UsageError: the program is not installed, or the file is our own.
  """
  programs: dict[str, Callable[..., tuple[str, Activations]]] = {
    'torchvision': torchvision_activations,
    'torch': torchvision_activations,
    'keras': keras_activations,
    'caffe': opencv_activations,
  }
  if kind not in programs:
    raise UsageError(f'{path} is our own file: there is no other program to compare with')
  head = spec.head
  num_classes = variables['params'][head]['bias'].shape[0]
  try:
    program, theirs = programs[kind](path, spec, num_classes, images)
  except ImportError as error:
    package = {'cv2': "'opencv-python-headless<5'"}.get(str(error.name), error.name)
    raise UsageError(f'--verify needs {error.name}; it is not installed: pip install {package}') from None
  taps = features(AlexNet(spec, num_classes), variables, images, list(theirs)[1:], batch_size=len(images))
  ours = {'input': network_input(spec, images), **taps}
  return program, {name: greatest_error(ours[name], theirs[name]) for name in theirs}


def network_input(spec: Spec, images: Sequence[np.ndarray]) -> np.ndarray:
  """Our view of the images, normalised: float32 [N, S, S, 3]."""
  views = np.stack([evaluation_view(image, spec) for image in images])
  return np.asarray(normalize({'image': jnp.asarray(views)}, preprocessing=spec.preprocessing)['image'])


def torchvision_activations(
  path: pathlib.Path, spec: Spec, num_classes: int, images: Sequence[np.ndarray]
) -> tuple[str, Activations]:
  """torchvision's own network and its own transforms, on the file read by PyTorch."""
  import torch
  import torchvision as tv
  from PIL import Image
  from safetensors.torch import load_file

  model = tv.models.alexnet(num_classes=num_classes)
  content = path.read_bytes()
  stored = load_file(path) if content[8:9] == b'{' else torchvision.read_pth(content, str(path))
  named = {name.removeprefix('module.'): torch.as_tensor(value) for name, value in stored.items()}
  try:
    model.load_state_dict(named)
  except RuntimeError as error:
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(f"{path} is not of torchvision's own network, so it cannot run it: {reason}") from None
  preset = tv.transforms._presets.ImageClassification(
    crop_size=spec.image_size, resize_size=round(spec.image_size / spec.preprocessing.center_crop_share)
  )
  inputs = torch.stack([preset(Image.fromarray(image)) for image in images])
  taps = torch_taps(model, spec, inputs)
  return f'torchvision {tv.__version__}, PyTorch {torch.__version__}', {
    'input': _nhwc(inputs),
    **taps,
  }


def torch_taps(model: Any, spec: Spec, images: Any) -> Activations:
  """Every module's output, by our names, of a PyTorch network whose modules have torchvision's names."""
  import torch

  taps: Activations = {}
  modules = dict(model.named_modules())
  for ours, theirs in torchvision.layer_names(spec).items():
    module = modules.get(theirs)  # flattening is none
    if module is not None:
      if hasattr(module, 'inplace'):
        module.inplace = False  # or it would write over what the module before it gave
      module.register_forward_hook(lambda _, __, output, ours=ours: taps.__setitem__(ours, _nhwc(output)))
  with torch.inference_mode():
    model.eval()(images)
  vectors = [name for name, tap in taps.items() if tap.ndim == 2]
  dense = next(name for name in vectors if name in weight_layers(spec))
  for name in vectors[: vectors.index(dense)]:  # flattened, but not yet mixed: C, H, W as fc6's kernel
    taps[name] = from_channels_first(f'params/{dense}/kernel', taps[name], spec).T
  return taps


def keras_activations(
  path: pathlib.Path, spec: Spec, num_classes: int, images: Sequence[np.ndarray]
) -> tuple[str, Activations]:
  """Keras's network, of a .keras file, or built of the spec for a .weights.h5 file; with our input."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # Keras would take the device's whole memory
  import keras

  if path.name.endswith('.keras'):
    model = keras.models.load_model(path, safe_mode=True)
  else:
    model = keras.Sequential.from_config(keras_network.keras_config(spec, num_classes)['config'])
    with tempfile.TemporaryDirectory() as folder:  # Keras insists on the ending
      model.load_weights(shutil.copy(path, pathlib.Path(folder, 'network.weights.h5')))
  inputs = network_input(spec, images)
  return f'Keras {keras.__version__}', {'input': inputs, **keras_taps(model, spec, inputs)}


def keras_taps(model: Any, spec: Spec, images: np.ndarray) -> Activations:
  """Every layer's output, by our names, of a Keras network with the spec's layers in their order.

  Changes the model: activations inside of its convolutions are taken out, and so is a last softmax.
  """
  import keras

  names = iter([name for name, layer in spec.named_layers() if not isinstance(layer, Dropout)])
  x = keras.ops.convert_to_tensor(images)
  taps = {}
  for layer in model.layers:
    if isinstance(layer, keras.layers.InputLayer | keras.layers.Dropout):
      continue
    inner = None
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
      inner, layer.activation = layer.activation, keras.activations.linear
    x = layer(x, training=False) if isinstance(layer, keras.layers.BatchNormalization) else layer(x)
    taps[next(names)] = np.asarray(x)
    if inner not in (None, keras.activations.linear, keras.activations.softmax):
      x = inner(x)
      taps[next(names)] = np.asarray(x)
  return taps


def opencv_activations(
  path: pathlib.Path, spec: Spec, num_classes: int, images: Sequence[np.ndarray]
) -> tuple[str, Activations]:
  """OpenCV's Caffe engine: the caffemodel, our prototxt, and the blob that OpenCV makes of our views."""
  import cv2

  if not hasattr(cv2.dnn, 'readNetFromCaffe'):
    raise ImportError('OpenCV 5 no longer reads Caffe networks', name='cv2')
  with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder, 'network.prototxt')
    caffe_network.write_prototxt(spec, num_classes, text)
    net = cv2.dnn.readNetFromCaffe(str(text), str(path))
  net.enableFusion(False)  # or a layer would give what the next one makes of it
  mean = caffe_network.caffe_input(spec, str(path)).mean
  views = [evaluation_view(image, spec) for image in images]
  side = (spec.image_size, spec.image_size)
  blob = cv2.dnn.blobFromImages(views, 1.0, side, mean, swapRB=True)
  net.setInput(blob)
  names = {ours: theirs for ours, theirs in caffe_network.layer_names(spec).items() if ours != 'flatten'}
  outputs = net.forward(list(names.values()))
  taps = {ours: _nhwc(output) for ours, output in zip(names, outputs, strict=True)}
  inputs = _nhwc(blob) if spec.preprocessing.channel_order == 'BGR' else _nhwc(blob)[..., ::-1]
  return f'OpenCV {cv2.__version__}', {'input': inputs, **taps}


def _nhwc(array: Any) -> np.ndarray:
  array = np.array(array.numpy() if hasattr(array, 'numpy') else array)  # a copy, of a tensor too
  return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
