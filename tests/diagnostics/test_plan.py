"""`alexnet-flax plan`: names of devices, the roofline, what it says; other compilers where installed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import jax
import pytest

from alexnet_flax.cli.main import main
from alexnet_flax.diagnostics import accelerators, hlo, plan
from alexnet_flax.diagnostics.accelerators import ACCELERATORS, parse_devices
from alexnet_flax.diagnostics.plan_text import lines
from alexnet_flax.errors import UsageError
from tests.helpers import SMALL, TINY, replace

pytestmark = pytest.mark.usefixtures('standard_promotion')


def has_compiler(name):
  try:
    accelerators.require_compiler(parse_devices(name))
  except UsageError:
    return False
  return True


needs_cuda = pytest.mark.skipif(not has_compiler('h100'), reason="JAX's plugin for CUDA is not installed")
needs_tpu = pytest.mark.skipif(not has_compiler('v5e'), reason='libtpu is not installed')


@pytest.fixture
def here(monkeypatch):
  """Compiles for this machine's CPUs in place of the devices that are named."""
  monkeypatch.setattr(plan, 'require_compiler', lambda devices: None)
  monkeypatch.setattr(plan, 'compile_only_devices', lambda devices: jax.devices()[: devices.count])


@pytest.mark.parametrize(
  ('text', 'count', 'name'),
  [('h100', 1, 'h100:1'), ('H200:8', 8, 'h200:8'), ('a100:2x8', 16, 'a100:2x8'), ('v5e:4x4', 16, 'v5e:4x4')],
)
def test_devices(text, count, name):
  devices = parse_devices(text)
  assert (devices.count, str(devices)) == (count, name)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('h10', "unknown device 'h10'; the nearest is 'h100' (devices: a100, h100, "),
    ('v5:4x4', "unknown device 'v5:4x4'; the nearest is 'v5"),
    ('v5e:16', '--device v5e:16: the shape after v5e: must be like 4x4'),
    ('h100:0', '--device h100:0: the shape after h100: must be like 8 or 2x8'),
    ('h100:1x2x3', 'must be like 8 or 2x8'),
  ],
)
def test_devices_that_are_none(text, message, capsys):
  assert main(['plan', '--device', text, *SMALL]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'extra'), [('h100', 'cuda'), ('v5e', 'tpu')])
def test_a_missing_compiler_is_one_line_with_what_installs_it(name, extra, monkeypatch, capsys):
  monkeypatch.setattr(accelerators, '_cuda_plugin', lambda: None)
  monkeypatch.setattr(accelerators.importlib.util, 'find_spec', lambda name: None)
  assert main(['plan', f'--device={name}', *SMALL]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'error: --device {name} needs ')
  assert f'[{extra}]' in line


def test_the_devices_of_this_machine_stay_untouched():
  program = """
import jax
from alexnet_flax.cli.main import main
assert main(['plan', '--device=none', '--config=configs/digits.py']) == 2
print(jax.config.jax_platforms)
"""
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_PLATFORMS'}
  done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True)
  assert done.stdout == 'cpu\n', done.stderr


@pytest.mark.parametrize('option', ['--batch=0', '--share=0', '--share=1.5', '--images=0'])
def test_options_out_of_range(option, capsys):
  assert main(['plan', '--device=h100', option, *SMALL]) == 2
  name, value = option.split('=')
  assert f'{name} (={value}' in capsys.readouterr().err


def test_the_roofline():
  """By hand: an H100 does 989.4 TFLOP/s in bfloat16, half in TF32; 3.352 TB/s; 450 GB/s to its neighbours."""
  h100 = ACCELERATORS['h100']
  seconds = plan.roofline(h100, 'bfloat16', 989.4e9, 6.704e9, 0.9e9)
  assert seconds == pytest.approx({'arithmetic': 1e-3, 'memory': 2e-3, 'collectives': 2e-3})
  assert plan.roofline(h100, 'float32', 989.4e9, 0, 0)['arithmetic'] == pytest.approx(2e-3)
  assert plan.available(h100) == round(0.75 * 84_942_979_072)  # XLA_PYTHON_CLIENT_MEM_FRACTION


@pytest.mark.parametrize(
  ('source', 'part'),
  [
    ('jit(guarded_step)/jvp(AlexNet)/conv1/AlexNet._apply/conv1/conv_general_dilated', 'conv1 forward'),
    ('jit(guarded_step)/transpose(jvp(AlexNet))/norm2/reduce_sum', 'norm2 backward'),
    ('jit(guarded_step)/jvp()/top_k', 'images and loss'),
    ('jit(guarded_step)/guard/reduce_sum', 'guard'),
    ('jit(guarded_step)/jit(_where)/select_n', 'update'),
    ('', 'copies'),
  ],
)
def test_parts_of_the_step(source, part):
  moved = hlo.Moved('fusion', source, 1)
  assert plan.part_of_step(moved, ['conv1', 'norm2']) == part
  assert plan.part_of_step(dataclasses.replace(moved, is_collective=True), []) == 'collectives'


def test_a_plan(here, data_dir, capsys):
  """With the compiler of this machine: two devices, the run's own step."""
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', '--share=0.25', '--json', '--batch=64']
  assert main(['plan', '--device=h100:2', *flags]) == 0
  out, said = capsys.readouterr()
  assert 'compiling the step for 64 images on h100:2' in said
  result = json.loads(out)
  assert (result['devices'], result['batch_size'], result['variant']) == (2, 64, 'batchnorm')
  assert result['fits']
  assert result['greatest_batch'] is None
  assert result['total_steps'] == 50  # 10 epochs of 320 images
  assert result['bytes_moved'] == sum(result['bytes_by_part'].values())
  assert {'conv1 forward', 'conv1 backward', 'update'} <= set(result['bytes_by_part'])
  # Gradients and statistics of the whole batch: no fewer bytes than the parameters have.
  count, sent = result['collectives']['all-reduce']
  assert count > 0
  assert sent > result['bytes_kept'] / 2 * 0.9
  at_roofline = 64 / max(result['seconds'].values())
  assert result['images_per_second'] == pytest.approx(at_roofline)
  assert result['hours'] == pytest.approx(50 * 64 / at_roofline / 0.25 / 3600)
  assert result['threads'] == -(-0.25 * at_roofline // 900)


def test_arithmetic_of_a_plan(here, data_dir):
  """2 x images x outputs x window, three times for layers with parameters but twice for the first."""
  config = replace(TINY, data={'data_dir': data_dir})
  result = plan.plan(config, parse_devices('h100'), say=lambda line: None)
  conv1 = 2 * 16 * taps(57, 11, 4) * 3 * 6
  conv2 = 2 * 16 * taps(7, 5, 1) * 6 * 16
  head = 2 * 16 * 3 * 3 * 16 * 10
  assert result.operations == 2 * conv1 + 3 * conv2 + 3 * head


def taps(side, window, strides):
  """Pairs of output and input pixels in both directions, with padding SAME."""
  outputs = -(-side // strides)
  low = max((outputs - 1) * strides + window - side, 0) // 2
  pairs = [(o, k) for o in range(outputs) for k in range(window) if 0 <= o * strides + k - low < side]
  return len(pairs) ** 2


def test_a_batch_that_does_not_fit(here, data_dir, monkeypatch, capsys):
  """A small card: the greatest batch that fits is found, and compiled; a sixteenth more does not fit."""
  small = dataclasses.replace(ACCELERATORS['h100'], memory=round(4e6 / 0.75))
  monkeypatch.setitem(ACCELERATORS, 'h100', small)
  flags = [*SMALL, f'--config.data.data_dir={data_dir}', '--batch=512']
  assert main(['plan', '--device=h100', *flags]) == 2
  out, said = capsys.readouterr()
  assert 'GB too much; the greatest found to fit is' in out
  greatest = int(out.partition('the greatest found to fit is ')[2].split()[0].replace(',', ''))
  assert 0 < greatest < 512
  assert f'trying {greatest:,}\n' in said
  assert main(['plan', '--device=h100', *flags[:-1], f'--batch={greatest + greatest // 16}']) == 2


def test_a_batch_that_the_compiler_refuses(here, data_dir, monkeypatch):
  """As libtpu refuses it, with what was used of the memory: here 1 GB for each image, of 15.75 GiB."""

  class Lowered:
    def __init__(self, experiment, like):
      self.images = experiment.config.data.batch_size

    def compile(self, compiler_options):
      if self.images > 16:
        used = f'Used {self.images / 1.073741824:.2f}G of 15.75G hbm'
        raise jax.errors.JaxRuntimeError(
          f'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. {used}.'
        )
      sizes = {'argument_size_in_bytes': 10**9 * self.images, 'temp_size_in_bytes': 0}
      sizes |= {'output_size_in_bytes': 0, 'alias_size_in_bytes': 0}
      return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))

  monkeypatch.setattr(plan, 'lower_train_step', Lowered)
  config = replace(TINY, data={'data_dir': data_dir, 'batch_size': 40})
  with pytest.raises(UsageError, match=r'=40\) does not fit on v5e:1x1: 23.1 GB too much; .* fit is 16$'):
    plan.plan(config, parse_devices('v5e'), say=lambda line: None)


def test_a_mesh_that_does_not_divide(here, data_dir, capsys):
  flags = [*SMALL, f'--config.data.data_dir={data_dir}']
  assert main(['plan', '--device=h100:3', *flags]) == 2
  assert 'must be divisible by the number of devices (=3); the nearest is 33' in capsys.readouterr().err


def test_data_that_are_not_prepared(here, tmp_path, capsys):
  flags = [*SMALL, f'--config.data.data_dir={tmp_path}', '--device=h100']
  assert main(['plan', *flags, '--config.data.dataset=cifar10']) == 2
  assert '; or state --images' in capsys.readouterr().err
  config = replace(TINY, data={'data_dir': str(tmp_path), 'dataset': 'imagenet2012', 'batch_size': 16})
  assert plan._source(config, None).num_examples == 1_281_167
  assert plan._source(replace(config, data={'dataset': 'cifar10'}), 50_000).num_examples == 50_000


def test_text(here, data_dir):
  config = replace(TINY, data={'data_dir': data_dir})
  result = plan.plan(config, parse_devices('h100'), say=lambda line: None)
  text = '\n'.join(lines(result))
  assert 'batchnorm, float32, 16 images a step on h100:1' in text
  assert 'at 495 TFLOP/s' in text
  assert 'the batch fits' in text
  assert f'bound by {result.bound}' in text
  for steps, unit in ((1, 'seconds'), (10**9, 'hours')):
    whole = '\n'.join(lines(dataclasses.replace(result, total_steps=steps)))
    assert re.search(rf'{steps:,} steps take [\d,.]+ {unit} at that speed', whole)
  tight = dataclasses.replace(result, bytes_available=result.bytes_greatest - 10**9, greatest_batch=8)
  assert '1.00 GB too much; the greatest found to fit is 8' in '\n'.join(lines(tight))


def test_the_input_is_measured(here, data_dir):
  config = replace(TINY, data={'data_dir': data_dir})
  plan_once = plan.plan(config, parse_devices('h100'), measure_input=True, say=lambda line: None)
  assert plan_once.input_is_measured
  assert plan_once.input_per_thread > 0


@needs_cuda
def test_a_deterministic_step_for_a_gpu(data_dir):
  config = replace(TINY, data={'data_dir': data_dir}, deterministic=True)
  result = plan.plan(config, parse_devices('h100'), say=lambda line: None)
  assert result.bytes_of_compiler is None
  assert result.bytes_moved > 0


@needs_tpu
@pytest.mark.parametrize('devices', ['v5e', 'v5e:2x2'])
def test_a_step_for_tpus(data_dir, devices):
  result = plan.plan(
    replace(TINY, data={'data_dir': data_dir}), parse_devices(devices), say=lambda line: None
  )
  assert result.bytes_of_compiler is not None
  assert ('all-reduce' in result.collectives) == (result.devices > 1)
