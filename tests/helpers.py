"""What several tests use: images, networks with random weights, tiny configurations, one trained run."""

import functools
import io
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

from alexnet_flax import checkpoint
from alexnet_flax.cli.train import train_and_report
from alexnet_flax.config import Config, with_values
from alexnet_flax.data.decode import decode_eval
from alexnet_flax.data.image_header import read_header
from alexnet_flax.weights.layout import variable_shapes, variables_of

# The embedded digits, and the whole default network at a sixteenth of its width.
NARROW = with_values(
  Config(),
  {
    'model.width': 1 / 16,
    'model.image_size': 57,
    'model.batch_norm_momentum': 0.9,
    'data.train_split': 'train[:80]',
    'data.eval_split': 'test[:37]',
    'data.batch_size': 16,
    'data.eval_batch_size': 24,
    'data.crop_scale': (0.7, 1.0),
    'data.crop_ratio': (0.9, 1.1),
    'data.flip': False,
    'data.num_threads': 1,
    'optimizer.learning_rate': 0.02,
    'total_epochs': 2.0,
    'report': False,
  },
)
# Two of its stages: it compiles in half of the time.
TINY = with_values(NARROW, {'transfer.layer': 'pool2'})

SMALL = (
  '--config=configs/digits.py',
  '--config.model.width=0.0625',
  '--config.model.image_size=57',
  '--config.model.dropout_rate=0.0',
  '--config.transfer.layer=pool2',
  '--config.data.train_split=train[:320]',
  '--config.optimizer.warmup_steps=2',
  '--config.eval_every_steps=100',
  '--config.report=false',
)

LOST_AFTER = 10  # seconds, of runs in several processes
_DISTRIBUTED = (
  '--config.optimizer.learning_rate=0.0005',  # at a high one rounding grows fast
  '--config.checkpoint_every_steps=2',
  '--config.keep_checkpoints=9',
  '--config.optimizer.schedule=constant',
  '--config.log_every_steps=4',
  '--config.record_examples=true',
)


def replace(config, **groups):
  """A configuration with changed keys: replace(TINY, data={'batch_size': 8}, seed=1)."""
  values = {}
  for name, value in groups.items():
    if isinstance(value, dict):
      values |= {f'{name}.{key}': item for key, item in value.items()}
    else:
      values[name] = value
  return with_values(config, values)


def encode(image: np.ndarray, kind: str = 'JPEG', **options) -> bytes:
  """An array as an image's bytes."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, kind, **options)
  return buffer.getvalue()


def smooth_image(height: int, width: int, seed: int) -> np.ndarray:
  """An image with large shapes, as photographs have: uint8 [height, width, 3]."""
  coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def eval_view(image, view):
  return decode_eval(view, [read_header(image)], np.zeros((1, 0)))['image'][0]


def command(data_dir, *flags):
  return [sys.executable, 'train.py', *SMALL, f'--config.data.data_dir={data_dir}', *flags]


def start_processes(
  data_dir, workdir, processes, devices, *flags, of_last=(), program='train.py', host='127.0.0.1', before=None
):
  """The processes of a run; together they have four devices. The last has further flags.

  Process 0 is on `host`; `before` has what stands before the command of each.
  """
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'{host}:{probe.getsockname()[1]}'
  environment = os.environ | {
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
  }
  cluster = [f'--coordinator={address}', f'--processes={processes}', f'--lost_after={LOST_AFTER}']
  python, _, *given = command(data_dir, *_DISTRIBUTED, *flags, f'--workdir={workdir}')
  return [
    subprocess.Popen(
      [
        *(before[number] if before else ()),
        python,
        program,
        *given,
        *([*cluster, f'--process_id={number}'] if processes > 1 else []),
        *(of_last if number == processes - 1 else ()),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(processes)
  ]


def finish(running):
  """(exit code, stdout, stderr) of each."""
  try:
    said = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()  # which a test that failed would leave behind
  return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def arrays(folder, step):
  return checkpoint.load_arrays(folder / 'checkpoints', step)


def initialize(model, images, seed=0):
  """The model's initial variables; compiled, which costs less than one operation after the other."""
  return jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), images)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(function, cotangent, *arguments):
  """A function's value, and the cotangents of its arguments; compiled."""
  value, pull = jax.vjp(function, *arguments)
  return value, pull(cotangent)


def random_variables(spec, num_classes=None, seed=0):
  """Variables as a trained network has them: no bias, scale or statistic is at its start."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in variable_shapes(spec, num_classes).items():
    values = rng.normal(size=shape)
    match name.rpartition('/')[2]:
      case 'kernel':
        values *= (2 / np.prod(shape[:-1])) ** 0.5 / _input_deviation(spec, name)
      case 'var':
        values = (0.5 + np.abs(values)) * _input_deviation(spec, name) ** 2
      case 'scale':
        values = 1 + 0.1 * values
      case _:
        values *= 0.1
    tensors[name] = values.astype(np.float32)
  return variables_of(tensors)


def _input_deviation(spec, name):
  """Pixels in 0..255 are some 60 times as large as what layers hand on."""
  bare = spec.preprocessing.scale == 1 and spec.preprocessing.std[0] == 1
  first = 'norm0' if any('norm0' in one for one in variable_shapes(spec)) else 'conv1'
  return 60.0 if bare and f'/{first}/' in name else 1.0


@functools.cache
def digits_run(data_dir: str, seed: int = 0) -> pathlib.Path:
  """The folder of a run of 20 steps, trained once for each process of a test run; seed 0 has a report."""
  folder = pathlib.Path(tempfile.mkdtemp()) / f'digits-{seed}'
  config = replace(
    NARROW,
    data={'data_dir': data_dir, 'train_split': 'train[:320]'},
    total_epochs=1.0,
    log_every_steps=5,
    eval_every_steps=10,
    seed=seed,
    report=seed == 0,
  )
  with jax.numpy_dtype_promotion('standard'):
    train_and_report(config, str(folder))
  return folder
