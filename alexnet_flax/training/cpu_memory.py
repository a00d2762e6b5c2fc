"""Memory of steps on a CPU: the process keeps it, where the C library would give it back after each step."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# <malloc.h>: the free memory at the heap's end above which it shrinks, and how many arrays are mapped apart.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_ASYNC = 'jax_cpu_enable_async_dispatch'


def keep_cpu_memory() -> bool:
  """Lets this process keep the memory of a step on one CPU device for the next; the values stay the same.

  XLA allocates the arrays of a step anew each time. glibc maps arrays of their size apart and unmaps them
  when they are freed, and the system clears each page that is touched again: AlexNet's step of 32 images has
  140,000 such faults, a seventh of its time. After this call JAX runs a program in the thread that calls it,
  whose heap may grow to any size as those of other threads may not, and the heap keeps what is freed.

  To be called before JAX is first asked for its devices; child processes inherit JAX's part of it. It changes
  nothing where there may be an accelerator or several devices, with another C library, or where the user has
  set `JAX_CPU_ENABLE_ASYNC_DISPATCH=true`. See mallopt(3), and HEAP_MAX_SIZE in glibc's malloc/arena.c.

  Returns:
    Whether memory is kept.
  """
  jax = sys.modules.get('jax')
  devices = jax.config.jax_num_cpu_devices if jax else os.environ.get('JAX_NUM_CPU_DEVICES', -1)
  several = str(devices) not in ('-1', '1') or 'device_count' in os.environ.get('XLA_FLAGS', '')
  if sys.platform != 'linux' or several or not has_cpus_alone():
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None or os.environ.setdefault(_ASYNC.upper(), 'false').lower() not in ('false', '0'):
    return False
  if jax:
    jax.config.update(_ASYNC, False)
  return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def has_cpus_alone() -> bool:
  """Returns whether JAX will find no accelerator; to ask JAX itself would start XLA's threads."""
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not (plugins or importlib.util.find_spec('libtpu'))
