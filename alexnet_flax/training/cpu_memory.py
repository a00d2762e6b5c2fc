"""Memory of steps on a CPU: the process keeps it, where the C library would give it back after each step."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys

# <malloc.h>: the free memory at the heap's end above which it shrinks, and how many arrays are mapped apart.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_ASYNC = 'jax_cpu_enable_async_dispatch'
_COMPILED = '/jax/core/compile/backend_compile_duration'
_LONG = 0.5  # seconds of a compilation after which its memory is given back


def keep_cpu_memory() -> bool:
  """Lets this process keep the memory of a step on one CPU device for the next; the values stay the same.

  XLA allocates the arrays of a step anew each time. glibc maps arrays of their size apart and unmaps them
  when they are freed, and the system clears each page that is touched again: AlexNet's step of 32 images has
  140,000 such faults, a seventh of its time. After this call JAX runs a program in the thread that calls it,
  whose heap may grow to any size as those of other threads may not, and the heap keeps what is freed. After
  a compilation of more than half a second, what is free is given back once: its holes are too small for a
  step's arrays.

  glibc before 2.39 may lose a few bytes beside an array (its bug 30723), whose place is then too small for
  the next step's: the heap was seen to grow to two or three times a step's arrays. Against that, set
  `GLIBC_TUNABLES=glibc.malloc.tcache_count=0` before the program starts.

  To be called before JAX is first asked for its devices; child processes inherit JAX's part of it. It changes
  nothing where there may be an accelerator or several devices, with another C library, or where the user has
  set `JAX_CPU_ENABLE_ASYNC_DISPATCH=true`. It imports JAX. See mallopt(3), malloc_trim(3), and HEAP_MAX_SIZE
  in glibc's malloc/arena.c.

  Returns:
    Whether memory is kept.
  """
  import jax

  devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  several = devices not in (-1, 1) or 'device_count' in os.environ.get('XLA_FLAGS', '')
  if sys.platform != 'linux' or several or not has_cpus_alone():
    return False
  library = ctypes.CDLL(None)
  if not hasattr(library, 'mallopt') or os.environ.get(_ASYNC.upper(), 'false').lower() not in ('false', '0'):
    return False
  if not (library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1)):
    return False
  os.environ[_ASYNC.upper()] = 'false'
  jax.config.update(_ASYNC, False)
  _trim_after_compilations()
  return True


@functools.cache
def _trim_after_compilations() -> None:
  import jax

  jax.monitoring.register_event_duration_secs_listener(_trim)


def _trim(event: str, duration_secs: float, **_: str | int) -> None:
  """Gives back to the system what is free, after a long compilation."""
  if event == _COMPILED and duration_secs > _LONG:
    ctypes.CDLL(None).malloc_trim(0)


def has_cpus_alone() -> bool:
  """Returns whether JAX will find no accelerator; to ask JAX itself would start XLA's threads."""
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not (plugins or importlib.util.find_spec('libtpu'))
