"""Several processes as one run, by JAX's runtime; a line instead of its abort when a process is lost.

JAX notices a lost process by missing heartbeats, and then aborts all others from a thread of its own. So the
training process is a child of the command, which passes on what it prints and says how it ended.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state as _runtime  # there is no public way to its messages
from jax.experimental import multihost_utils

from alexnet_flax.errors import PreemptedError, UnreachableError, UsageError
from alexnet_flax.files import write_text
from alexnet_flax.files.buckets import url_of
from alexnet_flax.training.preemption import heeded_signals
from alexnet_flax.training.rendezvous import meet

_CHILD = 'ALEXNET_FLAX_CHILD'
IS_CHILD = _CHILD in os.environ  # whether this is the training process, not the one that watches over it
_CODE = 'alexnet_flax {}: exit code '  # a line from the child to its parent, by a token that only they know
# What JAX and its transports print when another process does not answer.
_CONNECTION = re.compile(
  r'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|heartbeat|coordination service|PollForError|[Gg]loo|NCCL'
  r'|[Cc]onnection|[Ss]ocket'
)
_SILENT = r'Socket closed|UNAVAILABLE|[Cc]onnection (refused|reset)|failed to connect'
_COMES_WITHIN, _LOOK = 60.0, 0.2  # seconds in which processes come to the end of a run; between two looks
_run = 0  # the number of the run of this process
_LOST = 76  # the child's exit code when a collective failed and JAX did not say which process was gone


@dataclasses.dataclass(frozen=True)
class Cluster:
  """This process's place among the processes of a run; None where JAX is to find out."""

  coordinator: str | None = None  # HOST:PORT of process 0
  processes: int | None = None  # how many there are
  process_id: int | None = None  # 0 ... processes - 1
  lost_after: int = 60  # seconds without a heartbeat after which a process counts as lost
  join_within: int = 300  # seconds in which all processes must have come

  def __post_init__(self) -> None:
    given = (self.coordinator, self.processes, self.process_id)
    if given != (None, None, None):
      if None in given:
        raise UsageError('--coordinator=HOST:PORT, --processes=N and --process_id=I go together')
      if not re.fullmatch(r'.+:\d+', self.coordinator or ''):
        raise UsageError(f'--coordinator (={self.coordinator}) must be HOST:PORT, of process 0')
      if not 0 <= (self.process_id or 0) < (self.processes or 0):
        raise UsageError(f'--process_id (={self.process_id}) must be 0 ... {self.processes} - 1')
      if not 0 < int((self.coordinator or '').rpartition(':')[2]) < 1 << 16:
        raise UsageError(f'--coordinator (={self.coordinator}) must have a port of 1 ... 65535')
    for name, seconds in (('lost_after', self.lost_after), ('join_within', self.join_within)):
      if seconds < 1:
        raise UsageError(f'--{name} (={seconds}) must be at least 1 second')


def initialize(cluster: Cluster) -> None:
  """Joins the other processes, before JAX uses a device; from then on this one ends with its parent.

  Without flags JAX looks for SLURM, Open MPI, Kubernetes and Cloud TPU. Raises UsageError if the other
  processes cannot be reached.
  """
  threading.Thread(target=_die_with_parent, daemon=True).start()
  # By default JAX's coordinator listens on all addresses.
  local = re.match(r'(localhost|127\.[\d.]+):', cluster.coordinator or '')
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.processes,
      cluster.process_id,
      initialization_timeout=cluster.join_within,
      coordinator_bind_address=cluster.coordinator if local else None,
      heartbeat_timeout_seconds=cluster.lost_after,
      shutdown_timeout_seconds=cluster.lost_after,
    )
  except (ValueError, RuntimeError) as error:
    raise UsageError(f'cannot join the other processes: {" ".join(str(error).split())[:300]}') from None


def gather(value: Any) -> list[Any]:
  """Returns the values of all processes, in their order; a value is what JSON can hold."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(text.size)).tolist()
  rows = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - text.size)))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def check_equal(values: Mapping[str, Any]) -> None:
  """Compares what all processes must have in common.

  Raises UsageError if they differ; in each process, the same line names the first value that does.
  """
  first, *others = gather(values)
  for process, theirs in enumerate(others, start=1):
    for name in first | theirs:
      if (a := first.get(name)) != (b := theirs.get(name)):
        both = f'{name} is {a!r:.200} in process 0 and {b!r:.200} in process {process}'
        advice = 'start all processes with the same command, on the same data, with the same versions'
        raise UsageError(f'{both}; {advice}')


def check_one_folder(folder: pathlib.Path) -> None:
  """Raises UsageError if a process has another folder of that name, on a disk of its own."""
  if jax.process_count() == 1 or url_of(folder):  # of a run in a bucket, each has a copy
    return
  path, text, is_first = folder / '.one-folder', secrets.token_hex(), jax.process_index() == 0
  if is_first:
    write_text(path, text)
  text = gather(text)[0]  # the file is written when all have come here
  seen = gather(path.is_file() and path.read_text(encoding='utf-8') == text)
  if is_first:
    path.unlink()
  if not all(seen):
    what = f'--workdir={folder} of process {seen.index(False)} is another folder than that of process 0'
    raise UsageError(f'{what}; it must be one, on a disk that all processes share')


def of_process(name: str) -> str:
  """Returns this process's name of a file that each of them may write: hang.txt, hang-1.txt, ..."""
  path = pathlib.Path(name)
  return f'{path.stem}-{index}{path.suffix}' if (index := jax.process_index()) else name


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A block whose UsageError in one process ends all of them with it, instead of being waited for."""
  error = None
  try:
    yield
  except UsageError as raised:
    error = raised
  said = gather(_said(error))
  if error:
    raise error
  _raise_of(said)


def _said(error: Exception | None) -> list[Any] | None:
  """Returns what others need to know of an error: its text, and whether a bucket did not answer."""
  return None if error is None else [str(error), isinstance(error, UnreachableError)]


def _raise_of(said: Sequence[list[Any] | None]) -> None:
  for process, found in enumerate(said):
    if found:
      raise (UnreachableError if found[1] else UsageError)(f'process {process}: {found[0]}')


def clear_posts() -> None:
  """Begins a new run, in which nothing is posted yet; all processes call it."""
  global _run
  _run += 1


def post(name: str, value: Any) -> None:
  """Posts a value of this process under a name, for the others to see in the place of the one before.

  Nobody waits for it, so that threads may post.
  """
  if client := _runtime.client:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is lost, of which JAX makes an end
      key = f'alexnet_flax/{_run}/{name}/{jax.process_index()}'
      client.key_value_set(key, json.dumps(value), allow_overwrite=True)


def posted(name: str, process: int) -> Any:
  """Returns what a process has posted last under a name; None if nothing."""
  if client := _runtime.client:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # of what is not there
      return json.loads(client.key_value_try_get(f'alexnet_flax/{_run}/{name}/{process}'))
  return None


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """A block at the end of a run that takes some processes longer: all end with the first error.

  JAX takes a process that waits long for others at its end for lost. One that does not come here within a
  minute ends in another way, and is not waited for.
  """
  error = None
  post('comes', True)
  try:
    yield
  except Exception as raised:
    error = raised
  post('ended', [_said(error)])
  everyone, since = range(jax.process_count()) if _runtime.client else (), time.monotonic()
  while missing := [one for one in everyone if posted('ended', one) is None]:
    if time.monotonic() - since > _COMES_WITHIN and any(posted('comes', one) is None for one in missing):
      break
    time.sleep(_LOOK)
  if error:
    raise error
  _raise_of([(posted('ended', one) or [None])[0] for one in everyone])


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
  """A block that process 0 executes first, and the others when it has ended, whatever came of it."""
  several, first = jax.process_count() > 1, jax.process_index() == 0
  if several and not first:
    multihost_utils.sync_global_devices(what)
  try:
    yield
  finally:
    if several and first:
      multihost_utils.sync_global_devices(what)


def is_in_cluster() -> bool:
  """Returns whether a scheduler started this process as one of several, by the rules of JAX.

  Raises UsageError if it did, and JAX does not recognise it.
  """
  for environment in ClusterEnv._cluster_types:  # there is no public way to ask
    try:
      with warnings.catch_warnings(action='ignore'):  # of Kubernetes without its package
        present = not environment.opt_in_only_method and environment.is_env_present()
      if present:
        return environment.get_process_count() > 1
    except Exception as error:  # what a cloud's interface may raise
      print(f'note: {environment.__name__}: {error}; this process runs alone', file=sys.stderr)
      return False
  for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'):
    count = os.environ.get(name, '1')
    if count.isdigit() and int(count) > 1:
      flags = '--coordinator=HOST:PORT --processes=N --process_id=I'
      raise UsageError(f'{name}={count}, but JAX does not find the other processes; give each {flags}')
  return False


@contextlib.contextmanager
def lost_processes(cluster: Cluster) -> Iterator[None]:
  """A block in which a failed collective waits for JAX to name the lost process, and to abort this one."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if jax.process_count() == 1 or not _CONNECTION.search(text):
      raise
    print(text[:300], file=sys.stderr, flush=True)
    time.sleep(1.5 * cluster.lost_after)  # heartbeats are missed a little late
    os._exit(_LOST)


def tell_parent(code: int) -> int:
  """Tells this process's exit code, and returns it: JAX may still wait for the others, and abort."""
  if IS_CHILD:
    print(f'{_CODE.format(os.environ[_CHILD])}{code}', file=sys.stderr, flush=True)
  return code


def _die_with_parent() -> None:
  os.read(0, 1)  # never written to; ends with its other end
  os._exit(1)


def supervise(argv: Sequence[str], cluster: Cluster) -> int:
  """Runs the same command as a child and returns its exit code, once the other processes have come.

  Raises UsageError if they have not come or do not fit together, PreemptedError if another process was lost.
  """
  if cluster.coordinator:
    meet(cluster.coordinator, cluster.processes or 0, cluster.process_id or 0, cluster.join_within)
  last: collections.deque[str] = collections.deque(maxlen=100)
  told, token = None, secrets.token_hex(8)
  code_line = _CODE.format(token)
  with subprocess.Popen(
    [sys.executable, *argv],
    env=os.environ | {_CHILD: token},
    stdin=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors='replace',
    start_new_session=True,  # so that Ctrl-C comes by way of us alone
  ) as child:
    before = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in heeded_signals()}
    try:
      assert child.stderr is not None
      for line in child.stderr:
        last.append(line)
        if line.startswith(code_line):
          told = int(line.removeprefix(code_line))
        elif told is None and not line.startswith(('    @ ', '*** Check failure stack trace')):
          with contextlib.suppress(OSError):  # nobody may read it any more, and the run goes on
            print(line, end='', file=sys.stderr, flush=True)
      code = child.wait()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
  if told is not None:
    return told
  if 'RegisterTask' in ' '.join(last):  # what JAX was doing: joining
    raise UsageError(f'not all processes of this run have come within --join_within={cluster.join_within} s')
  if code == _LOST or (code == -signal.SIGABRT and _CONNECTION.search(' '.join(last))):
    name = f'process {cluster.process_id} of {cluster.processes}' if cluster.coordinator else 'this process'
    advice = 'start all of them again, and the run goes on from its last checkpoint'
    raise PreemptedError(f'{name} ends: {_lost(list(last), cluster)}; {advice}')
  return 128 - code if code < 0 else code


def _lost(lines: list[str], cluster: Cluster) -> str:
  text = ' '.join(lines)
  if match := re.search(r'stopped sending heartbeats\):\s+((?:[^\s]*task:)?[\d, ]+)', text):
    numbers = ', '.join(re.findall(r'\d+', match[1].rpartition('task:')[2]))
    return f'process {numbers} is lost (no sign of life for {cluster.lost_after} s)'
  is_silent = re.search('CoordinationService/Heartbeat', text) or (
    re.search('coordination service|PollForError', text) and re.search(_SILENT, text)
  )
  if is_silent and cluster.process_id != 0:
    place = f' at {cluster.coordinator}' if cluster.coordinator else ''
    return f'process 0, the coordinator{place}, is lost'
  return 'another process is lost'
