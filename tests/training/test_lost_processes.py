"""One of two processes is lost: killed in a collective, cut off from the network, or it waits for ever."""

import contextlib
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from alexnet_flax import checkpoint
from tests.helpers import LOST_AFTER, arrays, finish, start_processes

ENDLESS = ('--config.total_steps=100000', '--config.eval_every_steps=100000')
STEP = 7  # when its checkpoints of steps 2 and 4 are whole

# Process 1 does not make that step, when process 0 is in it.
_IN_A_COLLECTIVE = f"""
import os, pathlib, signal, sys, time
from alexnet_flax.training import loop
real, calls = loop.make_steps, []
begun, over = pathlib.Path(__file__).with_name('begun'), pathlib.Path(__file__).with_name('over')
def make_steps(requests):
  calls.append(1)
  if len(calls) != {STEP}:
    return real(requests)
  if '--process_id=0' in sys.argv:
    begun.touch()
    results = real(requests)
    jax.block_until_ready(results)
    over.touch()
    return results
  while not begun.exists():
    time.sleep(0.1)
  time.sleep(1)
  FAULT
loop.make_steps = make_steps
import jax
from alexnet_flax.cli.train import main
sys.exit(main(sys.argv))
"""


def program(folder, fault):
  folder.mkdir()
  path = folder / 'program.py'
  path.write_text(_IN_A_COLLECTIVE.replace('FAULT', fault))
  return str(path)


def assert_ends(results, *said):
  """All have ended with 75, and the last line of each says why."""
  assert [code for code, _, _ in results] == [75] * len(said), results
  for (_, _, error), pattern in zip(results, said, strict=True):
    assert re.search(pattern, error.splitlines()[-1]), error


def go_on(data_dir, folder, *flags, **options):
  """Starts again from the last checkpoint but one, to the bits of the last; without flags to its step."""
  last = checkpoint.steps_in(folder / 'checkpoints')[0]
  before = arrays(folder, last)
  shutil.rmtree(folder / 'checkpoints' / str(last))
  flags = flags or (f'--config.total_steps={last}',)
  results = finish(start_processes(data_dir, folder, 2, 1, *flags, **options))
  assert f', steps {last - 1} to ' in results[0][1], results
  after = arrays(folder, last)
  assert before.keys() == after.keys()
  for name, array in before.items():
    np.testing.assert_array_equal(array, after[name], err_msg=name)
  return results


def test_when_the_first_is_killed_the_other_says_so(data_dir, tmp_path):
  running = start_processes(data_dir, tmp_path, 2, 1, *ENDLESS)
  while not checkpoint.steps_in(tmp_path / 'checkpoints'):
    time.sleep(0.1)
    assert all(process.poll() is None for process in running)
  running[0].kill()
  since = time.monotonic()
  assert_ends(finish(running[1:]), 'process 1 of 2 ends: process 0, the coordinator at .*, is lost')
  assert time.monotonic() - since < 3 * LOST_AFTER
  running[0].communicate()


def test_one_is_lost_while_the_other_waits_in_a_collective(data_dir, tmp_path):
  """It is killed; after the restart it has heartbeats, but waits for ever: `hang_seconds` ends both."""
  folder = tmp_path / 'run'
  killed, hangs = tmp_path / 'killed', tmp_path / 'hangs'
  running = start_processes(
    data_dir, folder, 2, 1, *ENDLESS, program=program(killed, 'os.kill(os.getpid(), signal.SIGKILL)')
  )
  assert running[1].wait(240) == 128 + signal.SIGKILL  # of its training process
  since = time.monotonic()
  survivor, _ = finish(running)
  assert time.monotonic() - since < 3 * LOST_AFTER
  advice = 'start all of them again, and the run goes on from its last checkpoint'
  assert_ends([survivor], rf'^process 0 of 2 ends: process 1 is lost .*; {advice}$')

  flags = *ENDLESS, '--config.hang_seconds=10'
  results = go_on(data_dir, folder, *flags, program=program(hangs, 'time.sleep(1e6)'))
  hung = r'nothing has happened for .* s \(hang_seconds\), since step \d+ began; .* goes on$'
  assert_ends(results, f'{hung}|process 1 is lost', f'{hung}|process 0, .* is lost')  # the other may be first
  shown = list(folder.glob('hang*.txt'))
  assert shown
  assert all('in make_steps' in path.read_text() for path in shown)
  for place in (killed, hangs):
    assert (place / 'begun').exists()
    assert not (place / 'over').exists()


def inside(host, *arguments):
  """A command in the namespaces of a process."""
  spaces = ('--user', '--net', '--uts', '--preserve-credentials')
  return ['nsenter', f'--target={host.pid}', *spaces, *arguments]


@pytest.fixture
def network():
  """Two hosts with a wire between them, 10.99.0.1 and 10.99.0.2, in network namespaces of their own."""
  tools = [name for name in ('unshare', 'nsenter', 'ip', 'hostname') if not shutil.which(name)]
  if tools:
    pytest.skip(f'a network of its own needs {", ".join(tools)}')
  hosts = []
  with contextlib.ExitStack() as stack:
    for number, before in enumerate((['unshare', '-rnu'], ['unshare', '-nu']), start=1):
      # JAX's transport looks for its own address by the host's name.
      shell = ['sh', '-c', f'hostname 10.99.0.{number} && ip link set lo up && echo up; exec cat']
      command = [*before, *shell] if number == 1 else inside(hosts[0], *before, *shell)
      pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
      hosts.append(stack.enter_context(subprocess.Popen(command, text=True, **pipes)))
      stack.callback(hosts[-1].kill)
      if hosts[-1].stdout.readline() != 'up\n':
        pytest.skip(f'no network namespaces for this user: {hosts[-1].stderr.read().strip()}')
    link = ['link', 'add', 'wire', 'type', 'veth', 'peer', 'name', 'wire', 'netns', str(hosts[1].pid)]
    added = subprocess.run(inside(hosts[0], 'ip', *link), capture_output=True, text=True, check=False)
    if added.returncode:
      pytest.skip(f'no veth devices here: {added.stderr.strip()}')
    for number, host in enumerate(hosts, start=1):
      for words in (f'addr add 10.99.0.{number}/24 dev wire', 'link set wire up'):
        subprocess.run(inside(host, 'ip', *words.split()), check=True)
    yield hosts


def test_a_cut_network_ends_both_and_the_restart_goes_on(data_dir, tmp_path, network):
  before = [inside(host, 'env') for host in network]
  running = start_processes(data_dir, tmp_path, 2, 1, *ENDLESS, host='10.99.0.1', before=before)
  while len(checkpoint.steps_in(tmp_path / 'checkpoints')) < 2:
    time.sleep(0.1)
    assert all(process.poll() is None for process in running), finish(running)
  subprocess.run(inside(network[0], 'ip', 'link', 'set', 'wire', 'down'), check=True)
  since = time.monotonic()
  results = finish(running)
  assert time.monotonic() - since < 3 * LOST_AFTER
  lost = (
    rf'process 1 is lost \(no sign of life for {LOST_AFTER} s\)',
    'process 0, the coordinator at 10.99.0.1',
  )
  assert_ends(results, *lost)
  assert [code for code, _, _ in go_on(data_dir, tmp_path)] == [0, 0]
