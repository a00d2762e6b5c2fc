"""Two real processes of two CPU devices on loopback, as one run."""

import os
import signal

import jax
import numpy as np
import pytest

from alexnet_flax import checkpoint
from alexnet_flax.errors import PreemptedError, UnreachableError, UsageError
from alexnet_flax.training import batches, distributed, logger
from alexnet_flax.training.distributed import Cluster
from tests.helpers import arrays, finish, start_processes

SLURM = {
  'SLURM_JOB_ID': '1',
  'SLURM_STEP_NODELIST': 'n[1-2]',
  'SLURM_NTASKS': '8',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
  'SLURM_STEP_NUM_NODES': '2',
}


def examples(folder, processes):
  """Step -> the examples of its batch, of the steps that all of so many processes made."""
  parts = [
    {line['step']: line['examples'] for line in batches.read_examples(folder / f'examples-{number}.jsonl')}
    for number in range(processes)
  ]
  common = set.intersection(*map(set, parts))
  return {step: [number for part in parts for number in part[step]] for step in sorted(common)}


def assert_close(one, other, greatest):
  for name, array in one.items():
    assert np.abs(array - other[name]).max() <= greatest, name


@pytest.fixture(scope='module')
def alone(data_dir, tmp_path_factory):
  """A run of eight steps in one process of four devices."""
  folder = tmp_path_factory.mktemp('alone')
  ((code, _, error),) = finish(start_processes(data_dir, folder, 1, 4, '--config.total_steps=8'))
  assert code == 0, error
  return folder


def values(folder, last_step):
  return {
    (line['step'], line['split'], line['name']): line['value']
    for line in logger.read_metrics(folder)
    if line['step'] <= last_step and line['name'] != 'images_per_second'
  }


def test_two_processes_are_one_run_and_each_resumes_the_other(alone, data_dir, tmp_path):
  results = finish(start_processes(data_dir, tmp_path, 2, 2, '--config.total_steps=4'))
  assert [code for code, _, _ in results] == [0, 0], results
  assert 'in 2 processes' in results[0][1]
  assert 'step 4/4' in results[0][1]
  assert 'step ' not in results[1][1]  # one writes and prints
  assert len(list(tmp_path.glob('events.*'))) == 1
  whole = examples(alone, 1)
  assert examples(tmp_path, 2) == {step: whole[step] for step in range(1, 5)}
  for step in (2, 4):
    assert_close(arrays(tmp_path, step), arrays(alone, step), 1e-5)
  trained = {key: value for key, value in values(tmp_path, 4).items() if key[1] == 'train'}
  assert trained
  assert trained == pytest.approx({key: values(alone, 4)[key] for key in trained}, rel=1e-4)

  # On with one process of two devices, and with two processes again.
  for processes, devices, steps in ((1, 2, 6), (2, 2, 8)):
    results = finish(start_processes(data_dir, tmp_path, processes, devices, f'--config.total_steps={steps}'))
    assert [code for code, _, _ in results] == [0] * processes, results
    assert 'resuming' in results[0][1]
  keys = [(line['step'], line['split'], line['name']) for line in logger.read_metrics(tmp_path)]
  assert len(keys) == len(set(keys))
  found = {step: found for step, found in examples(tmp_path, 2).items() if step > 6}
  assert found == {step: whole[step] for step in (7, 8)}
  # Rounding grows with the steps: a maximum of equal values, a ReLU at 0.
  assert_close(arrays(tmp_path, 8), arrays(alone, 8), 1e-3)
  last = [
    {key: value for key, value in values(folder, 8).items() if key[0] == 8} for folder in (tmp_path, alone)
  ]
  assert last[0] == pytest.approx(last[1], rel=1e-3)


@pytest.mark.usefixtures('hangup_counts')
def test_a_signal_to_one_ends_both_at_the_same_step(data_dir, tmp_path):
  flags = ('--config.total_steps=100000', '--config.eval_every_steps=100000')
  running = start_processes(data_dir, tmp_path, 2, 2, *flags, '--config.checkpoint_every_steps=100000')
  assert running[0].stdout is not None
  for line in running[0].stdout:
    if line.startswith('step '):
      break
  running[1].send_signal(signal.SIGHUP)
  results = finish(running)
  assert [code for code, _, _ in results] == [75, 75], results
  (step,) = checkpoint.steps_in(tmp_path / 'checkpoints')
  assert f'ended at step {step} of' in results[0][2]
  assert f'ended at step {step} of' in results[1][2]


def test_processes_with_different_configurations_name_the_first_key(data_dir, tmp_path):
  """And it stays a mistake, not a lost process, after which a scheduler would start all again for ever."""
  results = finish(
    start_processes(data_dir, tmp_path, 2, 2, of_last=['--config.seed=1', '--config.total_steps=3'])
  )
  assert [code for code, _, _ in results] == [2, 2], results
  for _, _, error in results:
    assert error.splitlines()[-1].startswith('error: seed is 0 in process 0 and 1 in process 1; start all')
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def as_processes(monkeypatch):
  """Makes the functions of this module see two processes, of which this one is either."""

  def become(number, other_values):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(jax, 'process_index', lambda: number)
    others = iter(other_values)

    def gather(value):
      other = next(others)
      return [value, other] if number == 0 else [other, value]

    monkeypatch.setattr(distributed, 'gather', gather)

  return become


@pytest.mark.parametrize(('number', 'mine', 'theirs'), [(0, 'a', 'b'), (1, 'b', 'a')])
def test_what_must_be_equal(as_processes, number, mine, theirs):
  as_processes(number, [{'jax': '1', 'x': theirs}])
  with pytest.raises(
    UsageError, match=r"x is 'a' in process 0 and 'b' in process 1; start all processes with"
  ):
    distributed.check_equal({'jax': '1', 'x': mine})
  as_processes(number, [{'x': None, 'y': 1}])
  with pytest.raises(UsageError, match=r'y is .* in process 0 and .* in process 1'):
    distributed.check_equal({'x': None})
  as_processes(number, [{'x': mine}])
  distributed.check_equal({'x': mine})


@pytest.mark.parametrize('number', [0, 1])
def test_the_mistake_of_one_is_said_by_all(as_processes, number):
  for raised, is_unreachable in ((UsageError, False), (UnreachableError, True)):
    as_processes(number, [['its error', is_unreachable]])
    with pytest.raises(UsageError, match=f'process {1 - number}: its error') as error, distributed.together():
      pass
    assert type(error.value) is raised
  as_processes(number, [None])
  with pytest.raises(UsageError, match='my error'), distributed.together():
    raise UsageError('my error')


def test_a_folder_for_each_process(as_processes, tmp_path):
  as_processes(0, [None, False])
  with pytest.raises(
    UsageError, match='of process 1 is another folder than that of process 0; it must be one'
  ):
    distributed.check_one_folder(tmp_path)
  as_processes(1, ['text', True])
  with pytest.raises(UsageError, match='of process 1 is another folder than that of process 0'):
    distributed.check_one_folder(tmp_path)
  (tmp_path / '.one-folder').write_text('text')
  as_processes(1, ['text', True])
  distributed.check_one_folder(tmp_path)
  (tmp_path / '.one-folder').unlink()
  as_processes(0, [None, True])
  distributed.check_one_folder(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_an_error_of_one_process_is_not_anothers_loss(tmp_path, monkeypatch):
  """What the child tells of itself counts, whatever JAX does after it."""
  program = tmp_path / 'program.py'
  program.write_text(
    'import os, sys\n'
    'from alexnet_flax.training import distributed\n'
    'distributed.tell_parent(2) if sys.argv[1] == "told" else None\n'
    'print("terminate called after throwing bad_alloc" if sys.argv[1] == "memory" else'
    ' "UNAVAILABLE: stopped sending heartbeats): 1", file=sys.stderr)\n'
    'sys.stderr.flush()\n'
    'os.abort()\n'
  )
  monkeypatch.setenv('PYTHONPATH', os.getcwd())
  assert distributed.supervise([str(program), 'told'], Cluster()) == 2
  assert distributed.supervise([str(program), 'memory'], Cluster()) == 128 + signal.SIGABRT
  with pytest.raises(PreemptedError, match='process 1 is lost'):
    distributed.supervise([str(program), 'lost'], Cluster())


def test_only_a_lost_connection_is_a_lost_process(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  memory = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes')
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match='Out of memory'),
    distributed.lost_processes(Cluster()),
  ):
    raise memory


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'coordinator': 'host:1'}, 'go together'),
    ({'coordinator': 'host', 'processes': 2, 'process_id': 0}, r'--coordinator \(=host\) must be HOST:PORT'),
    (
      {'coordinator': 'host:1', 'processes': 2, 'process_id': 2},
      r'--process_id \\(=2\\) must be 0 ... 2 - 1',
    ),
    ({'lost_after': 0}, r'--lost_after \\(=0\\)'),
    ({'join_within': 0}, r'--join_within \\(=0\\)'),
    ({'coordinator': 'host:70000', 'processes': 2, 'process_id': 0}, r'must have a port of 1 ... 65535'),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(UsageError, match=message.replace('\\\\', '\\')):
    Cluster(**arguments)


def test_what_jax_says_of_lost_processes():
  cluster = Cluster('host:1', 4, 0, 7)
  heartbeats = (
    'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\nThe tasks have'
  )
  assert distributed._lost(heartbeats.splitlines(), cluster) == 'process 3 is lost (no sign of life for 7 s)'
  named = heartbeats.replace('3', '/job:jax_worker/replica:0/task:2')
  assert 'process 2 is lost' in distributed._lost(named.splitlines(), cluster)
  for text in ('PollForError: Socket closed', 'RPC: /xla.coordination.CoordinationService/Heartbeat'):
    assert 'process 0, the coordinator at host:1' in distributed._lost([text], Cluster('host:1', 4, 1, 7))
    assert distributed._lost([text], cluster) == 'another process is lost'  # it is process 0 itself
  barrier = 'PollForError: Shutdown barrier has failed; first task at the barrier: 1'
  assert distributed._lost([barrier], Cluster('host:1', 4, 1, 7)) == 'another process is lost'


def test_schedulers(monkeypatch):
  for name in ('OMPI_COMM_WORLD_SIZE', 'KUBERNETES_SERVICE_HOST', *SLURM):
    monkeypatch.delenv(name, raising=False)
  assert not distributed.is_in_cluster()
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')  # without its package, or without a job
  assert not distributed.is_in_cluster()
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')  # by a version of Open MPI that JAX does not know
  with pytest.raises(UsageError, match='OMPI_COMM_WORLD_SIZE=2, but JAX does not find the other processes'):
    distributed.is_in_cluster()
  monkeypatch.setenv('OMPI_MCA_orte_hnp_uri', '1531576320.0;tcp://10.96.0.1:34911')
  assert distributed.is_in_cluster()
  monkeypatch.delenv('OMPI_MCA_orte_hnp_uri')
  monkeypatch.delenv('OMPI_COMM_WORLD_SIZE')
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  assert distributed.is_in_cluster()
  monkeypatch.setenv('SLURM_NTASKS', '1')
  assert not distributed.is_in_cluster()


def test_a_line_of_the_child_cannot_pass_for_its_exit_code(capfd):
  forged = 'alexnet_flax: exit code x\nalexnet_flax 1: exit code 7\n'
  assert distributed.supervise(['-c', f'import sys; sys.stderr.write({forged!r})'], Cluster()) == 0
  assert capfd.readouterr().err == forged
