"""Processes meet at the coordinator's address before JAX joins them, which aborts if one does not come.

Each connects to process 0 and says who it is; process 0 tells all of them what is wrong, or nothing. Both are
lines of JSON.
"""

import contextlib
import errno
import json
import os
import re
import socket
import sys
import time
from typing import Any

from alexnet_flax.errors import UsageError

_MAX_LINE = 4096
_SPEAK_WITHIN = 5.0  # seconds in which whoever connects must say who it is
_RETRY_AFTER = 0.2
_SAY_AFTER = 10.0  # without an answer


def meet(coordinator: str, processes: int, process_id: int, within: float) -> None:
  """Returns when all processes have come to HOST:PORT of process 0, within so many seconds.

  Raises UsageError if they have not, or do not fit together: the same line in each that has come.
  """
  host, _, port = coordinator.rpartition(':')
  host = host.strip('[]')  # of an IPv6 address
  if process_id == 0:
    wrong = _welcome(_listen(host, int(port)), coordinator, processes, within)
  else:
    wrong = _ask((host, int(port)), coordinator, [process_id, processes], within)
  if wrong:
    raise UsageError(wrong)


def _listen(host: str, port: int) -> socket.socket:
  """Listens where JAX's coordinator will: at all addresses, unless the host is this machine's own."""
  try:
    if re.fullmatch(r'localhost|127\.[\d.]+', host):
      return socket.create_server((host, port))
    if socket.has_dualstack_ipv6():
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', port))
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      why = 'is in use on this machine, by another program or another process 0; end that or use another port'
    else:
      why = f'cannot be listened at: {os.strerror(error.errno or 0)}'
    raise UsageError(f'port {port} of --coordinator {why}') from None


def _welcome(server: socket.socket, coordinator: str, processes: int, within: float) -> str:
  """Waits for all others, tells each what is wrong, if anything is, and returns it."""
  deadline, wrong = time.monotonic() + within, ''
  come: dict[int, socket.socket] = {}
  others: list[socket.socket] = []
  with server:
    while not wrong and len(come) < processes - 1:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        missing = ', '.join(str(number) for number in range(1, processes) if number not in come)
        wrong = f'process {missing} of {processes} has not come to {coordinator} within {within:g} s'
        break
      connection.settimeout(_SPEAK_WITHIN)
      try:
        number, count = map(int, _hear(connection))
      except (OSError, OverflowError, TypeError, ValueError):  # of another program
        connection.close()
        continue
      others.append(connection)
      if count != processes:
        wrong = f'process {number} was started with --processes={count}, process 0 with {processes}'
      elif number in come and not _has_ended(come[number]):
        wrong = f'two processes have --process_id={number}; each needs its own, of 0 ... {processes - 1}'
      come[number] = connection
    for connection in others:
      with contextlib.suppress(OSError), connection:
        connection.sendall(f'{json.dumps(wrong)}\n'.encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # they close first, or the port would stay taken for a while
  return wrong


def _ask(address: tuple[str, int], coordinator: str, hello: list[int], within: float) -> str:
  """Tells process 0 who this is, as soon as it listens; returns what it says is wrong."""
  start, said = time.monotonic(), False
  while True:
    try:
      with socket.create_connection(address, timeout=_SPEAK_WITHIN) as connection:
        connection.sendall(f'{json.dumps(hello)}\n'.encode())
        connection.settimeout(within + _SPEAK_WITHIN)  # process 0 may wait as long for the others
        answer = _hear(connection)
      if not isinstance(answer, str):
        return f'what answers at --coordinator={coordinator} is not process 0 of this run'
      return answer
    except UnicodeError:
      return f'--coordinator={coordinator}: {address[0]!r} is no name of a machine'
    except OSError as error:
      reason = error.strerror or str(error)
    if not said and time.monotonic() > start + _SAY_AFTER:
      print(f'note: no process 0 at {coordinator} yet ({reason}); waiting {within:g} s', file=sys.stderr)
      said = True
    if time.monotonic() + _RETRY_AFTER > start + within:
      return f'no process 0 has answered at --coordinator={coordinator} within {within:g} s: {reason}'
    time.sleep(_RETRY_AFTER)


def _hear(connection: socket.socket) -> Any:
  """Returns what the other end says, None if it is no JSON; raises OSError if nothing comes."""
  with connection.makefile('rb') as file:
    line = file.readline(_MAX_LINE)
  if not line:
    raise ConnectionError('the connection was closed')
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return None


def _has_ended(connection: socket.socket) -> bool:
  connection.settimeout(0)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except OSError as error:
    return not isinstance(error, BlockingIOError)
  finally:
    connection.settimeout(_SPEAK_WITHIN)
