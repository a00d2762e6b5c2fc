"""Processes that do not find one another: each says what failed, within the time that was given."""

import concurrent.futures
import socket
import threading

import pytest

from alexnet_flax.errors import UsageError
from alexnet_flax.training import rendezvous
from alexnet_flax.training.distributed import Cluster, supervise


@pytest.fixture
def address():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{probe.getsockname()[1]}'


def meet(address, *processes, within=10.0):
  """What each of some processes is told: (process_id, number of processes) are theirs."""

  def one(process_id, count):
    try:
      return rendezvous.meet(address, count, process_id, within)
    except UsageError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(lambda process: one(*process), processes))


def test_all_meet_in_any_order_and_the_port_is_free_again(address, capsys):
  assert meet(address, (2, 3), (1, 3), (0, 3)) == [None] * 3
  assert meet(address, (0, 2), (1, 2)) == [None] * 2
  assert meet(address, (0, 1)) == [None]
  with socket.create_server(('127.0.0.1', int(address.rpartition(':')[2]))):
    pass


def test_one_never_comes(address):
  said = meet(address, (0, 4), (2, 4), within=0.5)
  assert said == [f'process 1, 3 of 4 has not come to {address} within 0.5 s'] * 2


def test_one_number_twice(address):
  said = meet(address, (0, 3), (1, 3), (1, 3))
  assert said == ['two processes have --process_id=1; each needs its own, of 0 ... 2'] * 3


def test_numbers_of_processes_that_differ(address):
  assert meet(address, (0, 3), (1, 2)) == ['process 1 was started with --processes=2, process 0 with 3'] * 2


def test_nobody_is_there_and_a_name_that_is_none(address, capsys, monkeypatch):
  monkeypatch.setattr(rendezvous, '_SAY_AFTER', 0.0)
  (said,) = meet(address, (1, 2), within=0.3)
  assert said == f'no process 0 has answered at --coordinator={address} within 0.3 s: Connection refused'
  assert f'note: no process 0 at {address} yet (Connection refused); waiting' in capsys.readouterr().err
  (said,) = meet('no-such-host.invalid:1234', (1, 2), within=0.3)
  assert said.startswith(
    'no process 0 has answered at --coordinator=no-such-host.invalid:1234 within 0.3 s: '
  )
  assert meet('a..b:1234', (1, 2)) == ["--coordinator=a..b:1234: 'a..b' is no name of a machine"]


def test_a_port_in_use(address):
  with socket.create_server(('127.0.0.1', int(address.rpartition(':')[2]))):
    (said,) = meet(address, (0, 2))
  assert said.startswith(f'port {address.rpartition(":")[2]} of --coordinator is in use on this machine, by')


def test_another_program_at_the_port(address):
  """Of those who connect to process 0, and in its place."""

  def visit(line=b'GET / HTTP/1.1\r\n\r\n'):
    with socket.create_connection(place, 5) as connection:
      connection.sendall(line)

  def serve():
    connection, _ = server.accept()
    with connection:
      connection.sendall(b'HTTP/1.0 400 Bad request\r\n')
      connection.recv(100)

  place = ('127.0.0.1', int(address.rpartition(':')[2]))
  with socket.create_server(place) as server:
    thread = threading.Thread(target=serve)
    thread.start()
    assert meet(address, (1, 2)) == [f'what answers at --coordinator={address} is not process 0 of this run']
    thread.join()
  server = rendezvous._listen(*place)
  visit()
  visit(b'[Infinity, 2]\n')
  (said,) = [rendezvous._welcome(server, address, 2, 0.3)]
  assert said == f'process 1 of 2 has not come to {address} within 0.3 s'


def test_one_that_is_started_anew_is_not_there_twice(address):
  server = rendezvous._listen('127.0.0.1', int(address.rpartition(':')[2]))
  for number in (1, 1, 2):
    connection = socket.create_connection(server.getsockname())
    connection.sendall(f'[{number}, 3]\n'.encode())
    connection.close()
  assert rendezvous._welcome(server, address, 3, 5.0) == ''


def test_the_command_says_it_before_it_trains(address):
  with pytest.raises(UsageError, match='process 1 of 2 has not come to'):
    supervise(['train.py'], Cluster(address, 2, 0, join_within=1))
