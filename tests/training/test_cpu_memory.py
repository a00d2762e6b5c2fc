"""Steps on a CPU: the memory of one is kept for the next, and only where that can be."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from alexnet_flax import keep_cpu_memory
from alexnet_flax.training import cpu_memory

PROGRAM = """
import resource
import sys
from alexnet_flax import keep_cpu_memory
kept = keep_cpu_memory() if sys.argv[1] == 'keep' else None
import jax

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step, x = jax.jit(lambda x: x + 1), jax.numpy.zeros(10_000_000)
for number in range(40):
  if number == 20:
    before = faults()
  x = jax.block_until_ready(step(x))
print(kept, (faults() - before) / 20 * resource.getpagesize() / x.nbytes, float(x[0]))
"""


def run(how):
  """Returns whether memory was kept, the share of a result that is fresh memory, and a number of it."""
  others = {name: value for name, value in os.environ.items() if not name.startswith(('XLA_', 'JAX_'))}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, how],
    env=others | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  kept, fresh, value = done.stdout.split()
  return kept, float(fresh), float(value)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone is known')
def test_steps_take_no_fresh_memory():
  kept, fresh, value = run('keep')
  assert (kept, value) == ('True', 40)
  assert fresh < 0.3
  kept, fresh, value = run('leave')
  assert (kept, value) == ('None', 40)
  assert fresh > 0.9  # so the test would notice


@pytest.mark.parametrize(
  ('devices', 'variables', 'kept'),
  [
    (-1, {}, True),
    (1, {}, True),
    (8, {}, False),
    (-1, {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}, False),
    (-1, {'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'true'}, False),
    (-1, {'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'False'}, True),
  ],
)
def test_nothing_changes_for_several_devices_or_against_the_users_will(monkeypatch, devices, variables, kept):
  for name in ('XLA_FLAGS', 'JAX_CPU_ENABLE_ASYNC_DISPATCH'):
    monkeypatch.delenv(name, raising=False)
  calls = []
  library = types.SimpleNamespace(mallopt=lambda *setting: calls.append(setting) or 1)
  config = types.SimpleNamespace(jax_num_cpu_devices=devices, update=lambda *setting: calls.append(setting))
  monkeypatch.setattr(jax, 'config', config)
  monkeypatch.setattr(cpu_memory.sys, 'platform', 'linux')
  monkeypatch.setattr(cpu_memory.ctypes, 'CDLL', lambda name: library)
  monkeypatch.setattr(cpu_memory, '_trim_after_compilations', lambda: calls.append('trims'))
  for name, value in {'JAX_PLATFORMS': 'cpu', **variables}.items():
    monkeypatch.setenv(name, value)
  before = dict(os.environ)
  assert keep_cpu_memory() == kept
  assert len(calls) == (4 if kept else 0)
  assert kept or os.environ == before


def test_memory_of_a_long_compilation_is_given_back(monkeypatch):
  trims = []
  monkeypatch.setattr(cpu_memory.ctypes, 'CDLL', lambda name: types.SimpleNamespace(malloc_trim=trims.append))
  jax.monitoring.register_event_duration_secs_listener(cpu_memory._trim)
  try:
    for longest, expected in ((60, []), (0, [0])):
      monkeypatch.setattr(cpu_memory, '_LONG', longest)
      jax.jit(lambda x, longest=longest: x + longest)(np.zeros(3))
      assert trims == expected
  finally:
    jax.monitoring.unregister_event_duration_listener(cpu_memory._trim)
