"""GPUs and TPUs as tables of numbers, and as compilation targets that this machine need not have."""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any, Literal

import jax

from alexnet_flax.errors import UsageError, install_command

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """The published numbers of one device.

  Attributes:
    kind: Which of XLA's compilers compiles for it.
    bfloat16, float32: Operations per second in matrix products, without sparsity. float32 is what JAX does by
      default: TF32 on GPUs, one pass of bfloat16 on TPUs.
    bandwidth: Bytes per second of the main memory.
    memory: Bytes of the main memory that programs can have.
    link: Bytes per second to other devices of its group, in each direction, all links together.
    target: What XLA wants to know of a GPU: `GpuDeviceInfoProto`, without what is the same for all.
  """

  kind: Literal['gpu', 'tpu']
  bfloat16: float
  float32: float
  bandwidth: float
  memory: int
  link: float
  target: tuple[tuple[str, str], ...] = ()

  def peak(self, dtype: str) -> float:
    """Returns the operations per second in a type."""
    return self.bfloat16 if dtype == 'bfloat16' else self.float32


def _gpu(
  bfloat16: float, float32: float, bandwidth: float, memory: int, link: float, **target: str
) -> Accelerator:
  return Accelerator('gpu', bfloat16, float32, bandwidth, memory, link, tuple(target.items()))


_HOPPER = {
  'core_count': '132',
  'clock_rate_ghz': '1.98',
  'fpus_per_core': '128',
  'l2_cache_size': '52428800',
  'shared_memory_per_core': '233472',
  'shared_memory_per_block_optin': '232448',
  'cuda_compute_capability': '{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }',
}
# Rates from the vendors' data sheets: NVIDIA's of A100 80GB SXM, H100 SXM, H200 and B200 (HGX), Google's
# pages of each TPU. Memory is what CUDA reports, and what libtpu lets programs use.
ACCELERATORS = {
  'a100': _gpu(
    *(312e12, 156e12, 2.039e12, 85_100_068_864, 300e9),
    core_count='108',
    clock_rate_ghz='1.41',
    fpus_per_core='64',
    l2_cache_size='41943040',
    shared_memory_per_core='167936',
    shared_memory_per_block_optin='166912',
    cuda_compute_capability='{ major: 8 minor: 0 }',
  ),
  'h100': _gpu(989.4e12, 494.7e12, 3.352e12, 84_942_979_072, 450e9, **_HOPPER),
  'h200': _gpu(989.4e12, 494.7e12, 4.8e12, 151_397_597_184, 450e9, **_HOPPER),
  'b200': _gpu(
    *(2250e12, 1125e12, 7.672e12, 191_514_411_008, 900e9),
    core_count='148',
    clock_rate_ghz='1.965',
    fpus_per_core='128',
    l2_cache_size='132644864',
    shared_memory_per_core='233472',
    shared_memory_per_block_optin='232448',
    cuda_compute_capability='{ major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES }',
  ),
  'v5e': Accelerator('tpu', 197e12, 197e12, 0.819e12, round(15.75 * _GIB), 200e9),
  'v5p': Accelerator('tpu', 459e12, 459e12, 2.765e12, round(95.74 * _GIB), 600e9),
  'v6e': Accelerator('tpu', 918e12, 918e12, 1.64e12, round(31.25 * _GIB), 400e9),
}
# How many sides the shape of a group has, and an example. GPUs: of one machine, or machines x GPUs in each.
_SIDES = {'v5e': ((2,), '4x4'), 'v5p': ((3,), '2x2x1'), 'v6e': ((2,), '4x4')}
_SAME = {
  'threads_per_block_limit': '1024',
  'threads_per_warp': '32',
  'threads_per_core_limit': '2048',
  'shared_memory_per_block': '49152',
  'registers_per_core_limit': '65536',
  'registers_per_block_limit': '65536',
  'block_dim_limit_x': '2147483647',
  'block_dim_limit_y': '65535',
  'block_dim_limit_z': '65535',
  'thread_dim_limit_x': '1024',
  'thread_dim_limit_y': '1024',
  'thread_dim_limit_z': '64',
  'device_address_bits': '64',
  'driver_version': '"13.0.0"',
  'runtime_version': '"12.8.0"',
  'compile_time_toolkit_version': '"12.8.0"',
  'dnn_version': '"9.10.0"',
}


@dataclasses.dataclass(frozen=True)
class Devices:
  """A number of equal devices: 'h100', 'h100:8', 'h100:2x8' (2 hosts of 8), 'v5e:4x4'."""

  name: str
  sides: tuple[int, ...]

  @property
  def accelerator(self) -> Accelerator:
    """The numbers of one device."""
    return ACCELERATORS[self.name]

  @property
  def count(self) -> int:
    """The number of devices."""
    return math.prod(self.sides)

  def __str__(self) -> str:
    return f'{self.name}:{"x".join(map(str, self.sides))}'


def parse_devices(text: str) -> Devices:
  """Reads a device's name and the shape of the group, of one device by default.

  Raises:
    UsageError: There is no such device, or the shape is not one.

  >>> parse_devices('v5e:4x4').count, str(parse_devices('h100'))
  (16, 'h100:1')
  """
  name, _, shape = text.lower().partition(':')
  if name not in ACCELERATORS:
    near = difflib.get_close_matches(name, ACCELERATORS, n=1, cutoff=0.1)
    meant = f'; the nearest is {near[0]!r}' if near else ''
    raise UsageError(f'unknown device {text!r}{meant} (devices: {", ".join(ACCELERATORS)})')
  count, example = _SIDES.get(name, ((1, 2), '8 or 2x8'))
  shape = shape or 'x'.join('1' * count[0])
  sides = tuple(map(int, shape.split('x'))) if re.fullmatch(r'[1-9]\d{0,3}(x[1-9]\d{0,3})*', shape) else ()
  if len(sides) not in count:
    raise UsageError(f'--device {text}: the shape after {name}: must be like {example}')
  return Devices(name, sides)


def require_compiler(devices: Devices) -> None:
  """Raises UsageError if the compiler for these devices is not installed."""
  kind = devices.accelerator.kind
  found = importlib.util.find_spec('libtpu') if kind == 'tpu' else _cuda_plugin()
  if found is None:
    extra, what = ('tpu', 'libtpu') if kind == 'tpu' else ('cuda', "JAX's plugin for CUDA")
    raise UsageError(
      f'--device {devices.name} needs {what}, which is not installed: {install_command(extra)}'
    )


def _cuda_plugin() -> str | None:
  for distribution in ('jax-cuda13-plugin', 'jax-cuda12-plugin'):
    try:
      return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
      continue
  return None


def compile_only_devices(devices: Devices) -> list[Any]:
  """Returns JAX's devices to compile for; they cannot run anything.

  Raises:
    UsageError: The compiler does not know a group of this shape.
  """
  from jax.experimental import topologies

  accelerator, sides = devices.accelerator, devices.sides
  try:
    if accelerator.kind == 'gpu':
      shape = 'x'.join(map(str, (1,) * (3 - len(sides)) + sides))
      target = {'target_config': gpu_target(devices.name), 'topology': shape}
      return list(topologies.get_topology_desc('', platform='cuda', **target).devices)
    for name, value in _NO_TPU.items():
      os.environ.setdefault(name, value)
    # libtpu takes hosts to have 2x2 chips, of which groups with odd sides are no multiple.
    host = {'chips_per_host_bounds': (*(2 - side % 2 for side in sides[:2]), 1)}
    return list(topologies.get_topology_desc(str(devices), platform='tpu', **host).devices)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = ' '.join(str(error).split())
    raise UsageError(f'--device {devices}: the compiler knows no such group: {reason}') from None


def gpu_target(name: str) -> str:
  """Returns XLA's description of a GPU, a `GpuTargetConfigProto` as text."""
  accelerator = ACCELERATORS[name]
  numbers = {
    'memory_bandwidth': f'{accelerator.bandwidth:.0f}',
    'device_memory_size': str(accelerator.memory),
    **dict(accelerator.target),
    **_SAME,
  }
  lines = [f'  {key}{"" if value.startswith("{") else ":"} {value}' for key, value in numbers.items()]
  version = 'dnn_version_info { major: 9 minor: 10 patch: 0 }'
  return '\n'.join(
    ['gpu_device_info {', *lines, '}', 'platform_name: "CUDA"', version, f'device_description_str: "{name}"']
  )


# Without these libtpu locks itself, asks a server that is not there what the machine's TPU is, and complains.
_NO_TPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
}
