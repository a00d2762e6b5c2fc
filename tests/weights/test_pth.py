"""PyTorch's files as people have them, made here without PyTorch, and what can be wrong with them."""

import argparse
import collections
import io
import json
import pickle
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax import VARIANTS, load_weights, save_weights
from alexnet_flax.cli.main import main
from alexnet_flax.errors import UsageError
from alexnet_flax.pretrained import load_pretrained
from alexnet_flax.weights import open_weights, pth, torchvision
from alexnet_flax.weights.layout import tensors_of
from tests.helpers import encode, random_variables, smooth_image

SPEC = VARIANTS['torchvision'].scaled(1 / 16, 67)
MAGIC, PROTOCOL, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True}


class Storage:
  def __init__(self, array, kind='Float'):
    self.array, self.kind = array, kind


class Call:
  """What a pickle calls: a function by its name, which need not exist here, with arguments."""

  def __init__(self, name, *arguments, state=None):
    self.name, self.arguments, self.state = name, arguments, state


class Called(Call):
  """A call of what a call returned."""

  def __init__(self, function, *arguments):
    super().__init__(function.name, *arguments)
    self.function = function


class Pickler(pickle._Pickler):
  """Writes what PyTorch's pickles contain: storages by their keys, and functions by their names."""

  def __init__(self, file, storages):
    super().__init__(file, 2)
    self.storages = storages

  def persistent_id(self, value):
    if not isinstance(value, Storage):
      return None
    self.storages.append(value.array)
    return 'storage', Name(f'torch.{value.kind}Storage'), str(len(self.storages) - 1), 'cpu', value.array.size

  def save(self, value, save_persistent_id=True):
    if isinstance(value, Name):
      module, _, name = value.rpartition('.')
      self.write(b'c' + f'{module}\n{name}\n'.encode())
    elif isinstance(value, Call):
      self.save(value.function if isinstance(value, Called) else Name(value.name))
      self.save(tuple(value.arguments))
      self.write(b'R')
      if value.state is not None:
        self.save(value.state)
        self.write(b'b')
    else:
      super().save(value, save_persistent_id)


class Name(str):
  pass


def tensor(array, kind='Float', offset=0, strides=None):
  array = np.ascontiguousarray(array)
  if strides is None:
    strides = tuple(stride // array.itemsize for stride in array.strides)
  empty = collections.OrderedDict()
  return Call(
    'torch._utils._rebuild_tensor_v2', Storage(array, kind), offset, array.shape, strides, False, empty
  )


def dumps(value, storages=None):
  buffer = io.BytesIO()
  Pickler(buffer, [] if storages is None else storages).dump(value)
  return buffer.getvalue()


def archive_of(value, byteorder='little', **options):
  storages, buffer = [], io.BytesIO()
  pickled = dumps(value, storages)
  with zipfile.ZipFile(buffer, 'w', **options) as archive:
    archive.writestr('archive/data.pkl', pickled)
    archive.writestr('archive/byteorder', byteorder)
    for key, array in enumerate(storages):
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return buffer.getvalue()


def pickles_of(value, system=SYSTEM):
  """The format before PyTorch 1.6."""
  storages: list[np.ndarray] = []
  pickled = dumps(value, storages)
  keys = [str(key) for key in range(len(storages))]
  blocks = [array.size.to_bytes(8, 'little') + array.tobytes() for array in storages]
  parts = [dumps(MAGIC), dumps(PROTOCOL), dumps(system), pickled, dumps(keys)]
  return b''.join([*parts, *blocks])


@pytest.fixture(scope='module')
def arrays():
  return torchvision.to_state_dict(tensors_of(random_variables(SPEC, 5)), SPEC)


def tensors(arrays, prefix='', **options):
  return {prefix + name: tensor(array, **options) for name, array in arrays.items()}


def same(content, arrays, path, exact=True):
  path.write_bytes(content)
  stored = open_weights(path).stored
  assert stored.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_allclose(stored[name], array, rtol=0 if exact else 1e-2)
  load_weights(path, SPEC)


def renamed(arrays, old, new):
  return {name.replace(old, new): tensor(array) for name, array in arrays.items()}


def test_checkpoints_as_people_have_them(arrays, tmp_path):
  plain, path = tensors(arrays), tmp_path / 'a.pth'
  namespace = Call('argparse.Namespace', state={'lr': 0.1, 'model': 'alexnet'})
  optimizer = {
    'state': {0: {'momentum_buffer': tensor(np.ones(3, np.float32))}},
    'param_groups': [{'lr': 0.1}],
  }
  for value in (
    plain,
    collections.OrderedDict(plain),
    tensors(arrays, 'module.'),
    tensors(arrays, '_orig_mod.'),
    tensors(arrays, 'model.'),
    tensors(arrays, '_orig_mod.module.'),
    # pytorch/examples and Places365 wrap `features` alone.
    {'epoch': 90, 'arch': 'alexnet', 'state_dict': renamed(arrays, 'features.', 'features.module.')},
    {'state_dict': renamed(arrays, 'features.', 'module.features.module.')},
    {'model_state_dict': plain, 'optimizer_state_dict': optimizer, 'loss': tensor(np.float32([0.5]))},
    # torchvision's reference checkpoint.
    {'model': plain, 'optimizer': optimizer, 'epoch': 3, 'args': namespace, 'scaler': None},
    {'n_averaged': tensor(np.int64([7]), 'Long'), **tensors(arrays, 'module.')},
    {name: Call('torch._utils._rebuild_parameter', one, True, {}) for name, one in plain.items()},
  ):
    same(archive_of(value), arrays, path)
    same(pickles_of(value), arrays, path)


def test_places365_by_command(tmp_path, capsys):
  """As alexnet_places365.pth.tar: PyTorch 0.2's format, `features` in DataParallel, 365 classes."""
  spec = VARIANTS['torchvision'].scaled(1 / 16)
  variables = random_variables(spec, 365)
  arrays = torchvision.to_state_dict(tensors_of(variables), spec)
  state = renamed(arrays, 'features.', 'features.module.')
  content = {'epoch': 90, 'arch': 'alexnet', 'state_dict': state, 'best_prec1': tensor(np.float32([50.0]))}
  path, image, out = (tmp_path / name for name in ('alexnet_places365.pth.tar', 'a.png', 'a.safetensors'))
  path.write_bytes(pickles_of(content))
  pixels = smooth_image(230, 250, 0)
  image.write_bytes(encode(pixels, 'PNG'))
  own = tmp_path / 'ours.safetensors'
  save_weights(own, spec, variables)
  assert main(['convert', str(path), str(out)]) == 0  # keeps the names
  capsys.readouterr()
  ((expected,),) = load_pretrained(own).classify([pixels], top=1)
  network = load_pretrained(path)
  assert network.class_names[:2] == ('airfield', 'airplane_cabin')
  assert expected.name == f'class {expected.label}'
  for arguments in ([str(image), str(path)], [str(image), '--weights', str(out)]):
    assert main(['predict', *arguments, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['best'][0]['name'] == network.readable_names[expected.label]
  assert load_pretrained(path.rename(tmp_path / 'other.pth.tar')).class_names[0] == 'class 0'


def test_other_types_strides_and_shared_storages(arrays, tmp_path):
  path = tmp_path / 'a.pt'
  double = {name: tensor(array.astype(np.float64), 'Double') for name, array in arrays.items()}
  same(archive_of(double), arrays, path)
  half = {name: tensor(array.astype(jnp.bfloat16), 'BFloat16') for name, array in arrays.items()}
  same(archive_of(half), arrays, path, exact=False)
  shared = Storage(np.concatenate([array.ravel() for array in arrays.values()]))
  offset, views = 0, {}
  for name, array in arrays.items():
    strides = tuple(stride // 4 for stride in array.strides)
    views[name] = Call('torch._utils._rebuild_tensor_v2', shared, offset, array.shape, strides, False, {})
    offset += array.size
  same(archive_of(views), arrays, path)
  turned = {name: tensor(array) for name, array in arrays.items()}
  weight = arrays['classifier.6.weight']
  turned['classifier.6.weight'] = Call(
    'torch._utils._rebuild_tensor_v2',
    Storage(weight.T.copy()),
    0,
    weight.shape,
    (1, weight.shape[0]),
    False,
    {},
  )
  same(archive_of(turned), arrays, path)


def test_nothing_in_a_pickle_is_imported_or_run(arrays, tmp_path):
  plain, path, marker = tensors(arrays), tmp_path / 'a.pth', tmp_path / 'executed'
  for hostile in (
    Call('os.system', f'touch {marker}'),
    Call('builtins.eval', f'open({str(marker)!r}, "w")'),
    Call('builtins.getattr', Name('builtins.list'), 'append'),
    Call('this.is_not_imported', state={'x': 1}),
    Call('numpy.load', str(marker)),
    Called(Call('operator.methodcaller', 'system', f'touch {marker}'), Name('os.path')),
  ):
    same(archive_of({'model': plain, 'args': hostile}), arrays, path)
    path.write_bytes(archive_of(hostile))
    with pytest.raises(UsageError, match=f'holds {hostile.name}, not a state dictionary'):
      open_weights(path)
  assert not marker.exists()
  assert 'this' not in sys.modules


def test_a_checkpoint_with_a_namespace_is_converted(arrays, tmp_path, capsys):
  (tmp_path / 'checkpoint.pth').write_bytes(
    archive_of(
      {'model': tensors(arrays), 'args': Call('argparse.Namespace', state=vars(argparse.Namespace(a=1)))}
    )
  )
  size = ['--variant', 'torchvision', '--width', '0.0625', '--image_size', '67']
  assert main(['convert', str(tmp_path / 'checkpoint.pth'), str(tmp_path / 'a.safetensors'), *size]) == 0
  assert main(['convert', str(tmp_path / 'a.safetensors'), str(tmp_path / 'b.pth')]) == 0
  np.testing.assert_array_equal(
    open_weights(tmp_path / 'b.pth').stored['features.3.bias'], arrays['features.3.bias']
  )


def test_one_flipped_bit_is_found(arrays, tmp_path):
  """In the numbers, in the archives of PyTorch and Keras."""
  path = tmp_path / 'a.pth'
  content = bytearray(archive_of(tensors(arrays)))
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(UsageError, match=r'a\.pth: broken.*Bad CRC-32'):
    load_weights(path, SPEC)
  spec, path = VARIANTS['batchnorm'].scaled(1 / 16, 67), tmp_path / 'a.keras'
  save_weights(path, spec, random_variables(spec, 5))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(UsageError, match=r'a\.keras: broken.*Bad CRC-32'):
    load_weights(path, spec)


def test_what_a_pth_must_not_hold(arrays, tmp_path):
  path, bias = tmp_path / 'a.pth', arrays['features.0.bias']
  numbers = Storage(bias)

  def rebuilt(offset, shape, strides):
    return Call('torch._utils._rebuild_tensor_v2', numbers, offset, shape, strides, False, {})

  two = {**tensors(arrays, 'student.'), **tensors(arrays, 'module.'), **tensors(arrays, 'model.')}
  for value, message in [
    (
      {**tensors(arrays), 'features.0.bias': Call('torch._utils._rebuild_sparse_tensor', 1)},
      'not a dense one',
    ),
    ({1: tensor(bias)}, 'not a state dictionary: its 1 is no tensor'),
    ({'epoch': 3}, "not a state dictionary: its 'epoch' is no tensor"),
    ([tensor(bias)], 'holds list, not a state dictionary'),
    (Call('torchvision.models.alexnet.AlexNet'), 'holds torchvision.models.alexnet.AlexNet, not a state'),
    ({'model': Call('torchvision.models.alexnet.AlexNet')}, 'holds torchvision.models.alexnet.AlexNet'),
    (two, 'holds two networks: module.features.0.weight and model.features.0.weight'),
    ({'a': rebuilt(0, (10**12,), (0,))}, r'tensor a of shape \(1000000000000,\) does not fit its'),
    ({'a': rebuilt(0, (2,), (10**9,))}, 'does not fit'),
    ({'a': rebuilt(1, bias.shape, (1,))}, 'does not fit'),
    ({'a': rebuilt(-1, (1,), (1,))}, 'does not fit'),
    ({'a': rebuilt(0, (-1,), (1,))}, 'does not fit'),
    ({'a': rebuilt('x', (1,), (1,))}, 'broken'),
    ({'a': tensor(bias, 'Double')}, 'tensor a is cut short'),
    ({'a': tensor(bias, 'Complex')}, 'broken'),
  ]:
    path.write_bytes(archive_of(value))
    with pytest.raises(UsageError, match=message) as caught:
      open_weights(path)
    assert '\n' not in str(caught.value)
  big = {**SYSTEM, 'little_endian': False}
  for content in (archive_of({'a': tensor(bias)}, byteorder='big'), pickles_of({'a': tensor(bias)}, big)):
    path.write_bytes(content)
    with pytest.raises(UsageError, match='its numbers are big-endian'):
      open_weights(path)


def test_truncated_and_inflated_files(arrays, tmp_path):
  path = tmp_path / 'a.pth'
  for content in (archive_of(tensors(arrays)), pickles_of(tensors(arrays))):
    for share in (0.0, 0.0001, 0.01, 0.3, 0.9, 0.9999):
      path.write_bytes(content[: int(share * len(content))])
      with pytest.raises(UsageError, match=r'a\.pth: \S'):
        load_weights(path, SPEC)
  # What is claimed is looked at, not what comes out.
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('archive/data.pkl', bytes(100))
    archive.infolist()[0].file_size = 3 * 2**30
  with pytest.raises(UsageError, match=r'refused: it has .* bytes and claims to hold 3,221,225,472'):
    open_weights(path)


def test_our_own_files_are_pickles_of_the_same_kind(arrays, tmp_path):
  (tmp_path / 'a.pth').write_bytes(pth.dump_state_dict(arrays))
  with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
    assert archive.testzip() is None
    pickled = archive.read('archive/data.pkl')
  assert pickled.count(b'ctorch._utils\n_rebuild_tensor_v2\n') == len(arrays)
  same((tmp_path / 'a.pth').read_bytes(), arrays, tmp_path / 'a.pth')


def test_a_dictionary_that_holds_itself():
  own: dict = {'epoch': 3}
  own['model'] = own
  with pytest.raises(UsageError, match='not a state dictionary'):
    pth.parse_state_dict(archive_of(own))
