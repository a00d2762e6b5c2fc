"""Set-up for all tests: eight CPU devices, warnings as errors, strict types."""

import importlib.metadata
import os
import tempfile

# Compiling takes most of the tests' time: the last two flags make it four times as fast. Where the
# optimisation that users have matters, a test asks for it. JAX 0.11 no longer has the third, and ends at it.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    *(['--xla_cpu_use_fusion_emitters=false'] if importlib.metadata.version('jaxlib') < '0.11' else []),
    os.environ.get('XLA_FLAGS', ''),
  ]
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
# Many tests train the same tiny network: all processes of one test run share what they compile.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  tempfile.gettempdir(), f'xla-{os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())}'
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'

import contextlib
import ctypes
import gc
import pathlib
import signal
import subprocess

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real images beside the checkout; tests that use them skip where they are absent."""
  if not SHARED_DATA.is_dir():
    pytest.skip('no folder of real images (../shared/data)')
  return SHARED_DATA


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory) -> str:
  """A folder of TFDS data sets for one process of the test run."""
  return str(tmp_path_factory.mktemp('tfds'))


@pytest.fixture
def hangup_counts():
  """Programs that the test starts end by SIGHUP, also where the tests themselves run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.fixture
def mount(tmp_path):
  """mount(options): the folder of a small file system; a second call mounts it again with other options."""
  if os.geteuid() != 0:
    pytest.skip('only root can mount a file system')
  folder = tmp_path / 'small'
  folder.mkdir()

  def mounted(options: str) -> pathlib.Path:
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)], check=True)
    return folder

  yield mounted
  subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.fixture
def standard_promotion():
  """For tests that train: optax's schedules and nn.BatchNorm mix types."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(autouse=True, scope='module')
def memory_of_a_module():
  """Compiled functions and their constants would otherwise stay for the whole test run."""
  yield
  give_memory_back()


@pytest.fixture(scope='session')
def kept_memory() -> dict[str, float]:
  """The bytes that stayed when memory was last given back."""
  gc.freeze()  # what all tests have imported need not be looked through each time
  return {'bytes': 1.4e9}


@pytest.fixture(autouse=True)
def memory_of_a_test(kept_memory):
  yield
  if resident_memory() > kept_memory['bytes'] + 3e8:
    give_memory_back()
    kept_memory['bytes'] = max(1.4e9, resident_memory())


def resident_memory() -> int:
  """The bytes of this process; 0 where the system does not say."""
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text(encoding='utf-8').split()[1])
  except OSError:
    return 0
  return pages * os.sysconf('SC_PAGE_SIZE')


def give_memory_back():
  jax.clear_caches()
  gc.collect()
  with contextlib.suppress(AttributeError, OSError):  # other C libraries have no malloc_trim
    ctypes.CDLL(None).malloc_trim(0)
