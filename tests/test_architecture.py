"""The arrows of docs/architecture.md: which module may import which."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path('alexnet_flax')

# What each module may import of ours. `run` and `training` alone know them all; `config` names choices.
ARROWS = {
  '__init__': {
    'activations',
    'losses',
    'metrics',
    'model',
    'optimizers',
    'saliency',
    'specs',
    'steps',
  },
  '__main__': {
    'errors',
    'verbs.convert',
    'verbs.demo',
    'verbs.doctor',
    'verbs.evaluate',
    'verbs.features',
    'verbs.predict',
    'verbs.prepare',
    'verbs.report',
    'verbs.verify_resume',
  },
  'activations': {
    'augment',
    'errors',
    'model',
    'naming',
    'pictures',
  },
  'augment': {
    'data.components',
    'specs',
  },
  'batches': {
    'data.pipeline',
    'data.source',
    'data.views',
    'probe',
    'run',
    'run_log',
    'steps',
  },
  'checkpoint': {
    'errors',
    'manifest',
    'steps',
  },
  'class_names': {
    'errors',
    'weights.download',
  },
  'command_line': {
    'config',
    'config_dict',
    'distributed',
    'errors',
    'show_batch',
    'training',
  },
  'config': {
    'editing',
    'specs',
  },
  'config_check': {
    'config',
    'data.bad_pictures',
    'data.views',
    'editing',
    'errors',
    'geometry',
    'guard',
    'losses',
    'optimizers',
    'specs',
  },
  'config_dict': {
    'config',
    'config_check',
    'errors',
  },
  'conversion': {
    'activations',
    'errors',
    'exporting.model_card',
    'naming',
    'parity',
    'pictures',
    'trained',
    'weights.download',
    'weights.layout',
  },
  'data.__init__': set(),
  'data.bad_pictures': {
    'errors',
  },
  'data.components': set(),
  'data.datasets': {
    'data.digits',
    'data.encoded',
    'data.folders',
    'data.records',
    'data.source',
    'errors',
  },
  'data.decoding': {
    'data.encoded',
    'data.views',
    'pictures',
  },
  'data.digits': set(),
  'data.encoded': {
    'pictures',
  },
  'data.few_shot': {
    'data.source',
    'errors',
  },
  'data.folders': {
    'data.source',
    'errors',
  },
  'data.order': set(),
  'data.pipeline': {
    'data.bad_pictures',
    'data.decoding',
    'data.order',
    'data.reading',
    'data.source',
    'data.train_decoding',
    'data.views',
  },
  'data.preparing': {
    'data.bad_pictures',
    'data.components',
    'data.datasets',
    'data.shards',
    'data.source',
    'errors',
  },
  'data.reading': {
    'data.bad_pictures',
    'data.encoded',
    'data.source',
    'errors',
    'pictures',
  },
  'data.records': {
    'errors',
  },
  'data.shards': {
    'data.bad_pictures',
    'data.decoding',
    'data.encoded',
    'data.reading',
    'data.source',
    'errors',
    'pictures',
  },
  'data.source': {
    'data.encoded',
  },
  'data.train_decoding': {
    'data.encoded',
    'data.views',
    'pictures',
  },
  'data.views': set(),
  'demo': {
    'activations',
    'drawing',
    'errors',
    'naming',
    'pages',
    'pictures',
    'prediction',
    'saliency',
    'specs',
    'trained',
  },
  'distributed': {
    'errors',
  },
  'doctor': {
    'batches',
    'config',
    'data.pipeline',
    'errors',
    'layer_statistics',
    'losses',
    'naming',
    'optimizers',
    'provenance',
    'run',
    'specs',
    'starting',
    'steps',
    'transfer',
  },
  'drawing': {
    'naming',
    'specs',
  },
  'editing': {
    'errors',
    'naming',
    'specs',
  },
  'errors': set(),
  'evaluation': {
    'augment',
    'class_names',
    'data.encoded',
    'data.pipeline',
    'data.source',
    'data.views',
    'errors',
    'pictures',
    'protocols',
    'scoring',
    'trained',
  },
  'exporting.__init__': set(),
  'exporting.model_card': {
    'errors',
    'pretrained',
    'provenance',
    'run_log',
    'trained',
  },
  'exporting.onnx_graph': {
    'errors',
    'geometry',
    'naming',
    'specs',
    'weights.layout',
  },
  'exporting.stablehlo': {
    'augment',
    'model',
    'naming',
    'specs',
    'weights.layout',
  },
  'failures': {
    'checkpoint',
    'data.order',
    'run',
    'steps',
  },
  'family': {
    'model',
    'naming',
    'specs',
  },
  'feature_files': {
    'activations',
    'errors',
    'model',
    'naming',
    'pictures',
    'pretrained',
    'specs',
    'weights.caffe_network',
    'weights.torchvision',
  },
  'geometry': {
    'naming',
    'specs',
  },
  'guard': {
    'metrics',
    'steps',
  },
  'imagenet_sets': set(),
  'layer_statistics': {
    'augment',
    'model',
    'naming',
  },
  'layers': {
    'geometry',
    'specs',
  },
  'loop': {
    'batches',
    'checkpoint',
    'errors',
    'failures',
    'metrics',
    'run',
    'run_log',
    'steps',
    'stopping',
  },
  'losses': set(),
  'manifest': set(),
  'metrics': {
    'losses',
  },
  'model': {
    'geometry',
    'layers',
    'naming',
    'specs',
  },
  'naming': {
    'specs',
  },
  'optimizers': {
    'naming',
    'specs',
  },
  'pages': set(),
  'parity': {
    'activations',
    'augment',
    'errors',
    'model',
    'naming',
    'pictures',
    'specs',
    'weights.caffe_network',
    'weights.keras_network',
    'weights.layout',
    'weights.torchvision',
  },
  'pictures': {
    'data.views',
    'errors',
    'specs',
  },
  'prediction': {
    'activations',
    'errors',
    'naming',
    'pictures',
    'saliency',
    'trained',
  },
  'pretrained': {
    'checkpoint',
    'config',
    'config_dict',
    'errors',
    'specs',
  },
  'probe': {
    'augment',
    'data.order',
    'model',
    'naming',
    'steps',
  },
  'protocols': {
    'data.datasets',
    'data.source',
    'data.views',
    'errors',
    'geometry',
    'imagenet_sets',
    'trained',
  },
  'provenance': set(),
  'report.__init__': set(),
  'report.charts': set(),
  'report.content': {
    'config',
    'drawing',
    'report.charts',
    'report.pictures',
    'report.subject',
  },
  'report.page': {
    'errors',
    'pages',
    'report.charts',
    'report.content',
    'report.subject',
  },
  'report.pictures': {
    'activations',
    'data.source',
    'drawing',
    'layer_statistics',
    'naming',
    'report.subject',
    'scoring',
    'specs',
  },
  'report.subject': {
    'config',
    'data.datasets',
    'data.encoded',
    'data.source',
    'data.views',
    'errors',
    'evaluation',
    'pictures',
    'pretrained',
    'protocols',
    'provenance',
    'run',
    'run_log',
    'scoring',
    'steps',
    'trained',
  },
  'resume_proof': {
    'checkpoint',
    'errors',
    'manifest',
    'run_log',
  },
  'run': {
    'augment',
    'config',
    'data.bad_pictures',
    'data.components',
    'data.datasets',
    'data.few_shot',
    'data.source',
    'data.views',
    'distributed',
    'editing',
    'errors',
    'guard',
    'losses',
    'model',
    'naming',
    'optimizers',
    'probe',
    'specs',
    'steps',
    'transfer',
  },
  'run_folder': {
    'config',
    'errors',
    'provenance',
  },
  'run_log': {
    'errors',
    'metrics',
  },
  'saliency': {
    'augment',
    'errors',
    'model',
    'naming',
    'specs',
  },
  'scorecard': {
    'data.source',
    'errors',
    'evaluation',
    'imagenet_sets',
    'protocols',
    'scoring',
    'trained',
  },
  'scoring': set(),
  'show_batch': {
    'batches',
    'config',
    'data.order',
    'data.pipeline',
    'data.views',
    'errors',
    'run',
    'specs',
    'steps',
  },
  'specs': set(),
  'starting': {
    'config',
    'errors',
    'naming',
    'pretrained',
    'run',
    'steps',
    'transfer',
  },
  'steps': {
    'losses',
    'metrics',
  },
  'stopping': set(),
  'trained': {
    'class_names',
    'model',
    'naming',
    'pretrained',
    'specs',
  },
  'training': {
    'batches',
    'checkpoint',
    'class_names',
    'config',
    'data.pipeline',
    'errors',
    'loop',
    'provenance',
    'report.page',
    'report.subject',
    'run',
    'run_folder',
    'run_log',
    'starting',
    'steps',
    'stopping',
  },
  'transfer': {
    'editing',
    'errors',
    'naming',
    'specs',
  },
  'variants.__init__': {
    'specs',
    'variants.article',
    'variants.caffe',
    'variants.krizhevsky',
    'variants.ports',
  },
  'variants.article': {
    'specs',
  },
  'variants.caffe': {
    'specs',
  },
  'variants.krizhevsky': {
    'specs',
  },
  'variants.ports': {
    'specs',
  },
  'verbs.__init__': set(),
  'verbs.convert': {
    'conversion',
    'verbs.options',
  },
  'verbs.demo': {
    'demo',
    'errors',
    'verbs.options',
  },
  'verbs.doctor': {
    'command_line',
    'config',
    'doctor',
  },
  'verbs.evaluate': {
    'errors',
    'pretrained',
    'scorecard',
    'trained',
    'verbs.options',
  },
  'verbs.features': {
    'errors',
    'feature_files',
    'verbs.options',
  },
  'verbs.options': {
    'class_names',
    'errors',
    'trained',
  },
  'verbs.predict': {
    'errors',
    'prediction',
    'verbs.options',
  },
  'verbs.prepare': {
    'data.datasets',
    'data.preparing',
    'data.shards',
    'errors',
    'verbs.options',
  },
  'verbs.report': {
    'report.page',
    'report.subject',
    'verbs.options',
  },
  'verbs.verify_resume': {
    'command_line',
    'errors',
    'resume_proof',
  },
  'weights.__init__': {
    'errors',
    'naming',
    'specs',
    'weights.caffe',
    'weights.caffe_network',
    'weights.download',
    'weights.keras',
    'weights.layout',
    'weights.native',
    'weights.torchvision',
  },
  'weights.caffe': {
    'errors',
    'naming',
    'specs',
    'weights.caffe_network',
    'weights.caffe_schema',
    'weights.layout',
  },
  'weights.caffe_network': {
    'errors',
    'naming',
    'specs',
    'weights.caffe_schema',
    'weights.layout',
  },
  'weights.caffe_schema': set(),
  'weights.download': {
    'errors',
  },
  'weights.keras': {
    'errors',
    'naming',
    'specs',
    'weights.keras_network',
    'weights.layout',
  },
  'weights.keras_network': {
    'errors',
    'naming',
    'specs',
  },
  'weights.layout': {
    'errors',
    'geometry',
    'model',
    'naming',
    'specs',
  },
  'weights.native': {
    'editing',
    'errors',
    'model',
    'naming',
    'specs',
    'weights.layout',
  },
  'weights.torchvision': {
    'errors',
    'naming',
    'specs',
    'weights.layout',
  },
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


def test_tensorflow_is_imported_by_the_input_alone():
  for name, path in modules():
    if any(one.split('.')[0] == 'tensorflow' for one in imports(path)):
      assert name in (
        'data.pipeline',
        'data.decoding',
        'data.train_decoding',
        'data.preparing',
        'data.shards',
        'doctor',  # which looks whether it sees a GPU
        'parity',
      )


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
