"""`alexnet-flax plan`."""

import argparse
import contextlib

from alexnet_flax.errors import UsageError

HELP = 'what a run would need on GPUs or TPUs that are not here'
DESCRIPTION = (
  'Compiles the training step of --config=FILE [--config.KEY=VALUE ...] for devices that need not be here,'
  ' and prints its arithmetic, bytes moved, memory and collectives, and the speed that they allow. Needs the'
  ' extra cuda or tpu.'
)
TAKES_FLAGS = True  # those of train.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--device', required=True, help='a100, h100, h200, b200 (h100:8), v5e:4x4, v5p:2x2x1, v6e:4x4'
  )
  parser.add_argument('--batch', type=int, help='images a step, all devices together; data.batch_size')
  parser.add_argument('--share', type=float, default=0.5, help="expected share of the roofline's speed (0.5)")
  parser.add_argument('--images', type=int, help='number of training images, if the data are not here')
  parser.add_argument('--measure-input', action='store_true', help='measure one thread of the input')
  parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> int:
  import json
  import os
  import sys

  import jax

  if not os.environ.get('JAX_PLATFORMS'):  # this machine's own devices stay untouched
    jax.config.update('jax_platforms', 'cpu')
  from alexnet_flax.cli.train import parse
  from alexnet_flax.diagnostics.accelerators import parse_devices
  from alexnet_flax.diagnostics.plan import plan
  from alexnet_flax.diagnostics.plan_text import lines

  devices = parse_devices(arguments.device)
  for name in ('batch', 'images'):
    value = getattr(arguments, name)
    if value is not None and value < 1:
      raise UsageError(f'--{name} (={value}) must be at least 1')
  if not 0 < arguments.share <= 1:
    raise UsageError(f'--share (={arguments.share}) must be more than 0 and at most 1')
  flags = arguments.flags
  if arguments.batch is not None:
    flags = [*flags, f'--config.data.batch_size={arguments.batch}']
  config = parse(['train.py', *flags])[0]
  with contextlib.redirect_stdout(sys.stderr):  # TFDS speaks while it prepares the digits
    result = plan(
      config,
      devices,
      share=arguments.share,
      measure_input=arguments.measure_input,
      num_images=arguments.images,
      say=lambda line: print(line, flush=True),
    )
  print(json.dumps(result.to_dict(), indent=2) if arguments.json else '\n'.join(lines(result)))
  return 0 if result.fits else 2
