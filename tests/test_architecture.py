"""The arrows of docs/architecture.md: which module may import which."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path('alexnet_flax')

# What each module may import of ours. `run` and `training` alone know them all; `config` names choices.
ARROWS = {
  '__init__': {'losses', 'metrics', 'model', 'optimizers', 'specs', 'steps', 'variants'},
  '__main__': {'data.datasets', 'errors'},
  'augment': {'specs'},
  'checkpoint': {'errors', 'steps'},
  'command_line': {'config', 'config_dict', 'errors', 'training', 'variants'},
  'config': {'errors', 'geometry', 'losses', 'optimizers', 'specs', 'variants'},
  'config_dict': {'config', 'errors'},
  'data.__init__': set(),
  'data.datasets': {'data.digits', 'data.records', 'errors'},
  'data.digits': set(),
  'data.order': set(),
  'data.pipeline': {'data.datasets', 'data.order', 'data.views', 'errors'},
  'data.records': {'errors'},
  'data.views': set(),
  'errors': set(),
  'geometry': {'specs'},
  'layers': {'geometry', 'specs'},
  'losses': set(),
  'metrics': {'losses'},
  'model': {'geometry', 'layers', 'specs'},
  'optimizers': {'specs'},
  'run_log': {'metrics'},
  'run': {
    'augment',
    'config',
    'data.datasets',
    'data.pipeline',
    'data.views',
    'errors',
    'losses',
    'model',
    'optimizers',
    'steps',
  },
  'specs': set(),
  'steps': {'losses', 'metrics'},
  'training': {
    'checkpoint',
    'config',
    'data.pipeline',
    'errors',
    'metrics',
    'run',
    'run_log',
    'steps',
  },
  'variants': {'specs'},
}


def modules():
  for path in sorted(PACKAGE.rglob('*.py')):
    yield '.'.join(path.relative_to(PACKAGE).with_suffix('').parts), path


def imports(path):
  """Full names of everything that a file imports, wherever it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def ours(path):
  names = dict(modules())
  for name in imports(path):
    if name.startswith('alexnet_flax.'):
      parts = name.split('.')[1:]
      found = [part for part in ('.'.join(parts), '.'.join(parts[:-1])) if part in names]
      if found:
        yield found[0]


def test_arrows():
  found = {name: set(ours(path)) for name, path in modules()}
  assert set(found) == set(ARROWS)
  for name, allowed in ARROWS.items():
    assert found[name] <= allowed, f'{name} imports {found[name] - allowed}'
    assert allowed <= found[name], f'{name} no longer imports {allowed - found[name]}'


def test_tensorflow_is_imported_by_tf_datas_own_path_alone():
  for name, path in modules():
    if any(one.split('.')[0] == 'tensorflow' for one in imports(path)):
      assert name in ('data.pipeline', 'data.views', 'data.datasets')


def test_importing_the_package_loads_no_tensorflow():
  code = (
    'import sys, alexnet_flax\n'
    'from alexnet_flax import AlexNet, VARIANTS, TrainState, train_step\n'
    'loaded = {name.split(".")[0] for name in sys.modules}\n'
    'print(loaded & {"tensorflow", "tensorflow_datasets", "keras", "torch", "sklearn"})\n'
  )
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == 'set()'


def test_modules_can_be_read_in_one_sitting():
  for name, path in modules():
    assert len(path.read_text().splitlines()) <= 250, name
