"""`alexnet-flax demo`: a web page that classifies images, by default for this machine only."""

import asyncio
import contextlib
import errno
import io
import pathlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Message
from uvicorn.protocols.http.h11_impl import H11Protocol

from alexnet_flax.data.images import UnreadableError, evaluation_view, read_image
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.inference.grad_cam import grad_cam, overlay
from alexnet_flax.models.spec import Dropout, Flatten
from alexnet_flax.pretrained import PretrainedModel, top_classes
from alexnet_flax.viz.figures import channel_tiles, data_uri, filter_tiles, first_kernel, page_template

MAX_BYTES = 20 << 20
_MAX_PIXELS = 100_000_000  # of strangers; files of one's own may have more
_FORM = 4096  # bytes of a form besides its image
_BODY_SECONDS = 30.0  # within which an image must have arrived
_CONNECTION_SECONDS = 120.0  # after which a connection is closed, whatever it does
_CONNECTIONS = 128
FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF')
_LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def application(network: PretrainedModel, hosts: tuple[str, ...] = ('*',)) -> Starlette:
  """Returns the web application: GET / is the page, POST /predict takes the image as 'image'.

  Args:
    network: The network that predicts.
    hosts: The accepted host names. Other names are refused, which prevents DNS rebinding by other sites.
  """
  page = page_template('demo.html').render(
    network=network,
    name=pathlib.PurePath(network.source).name,
    filters=data_uri(filter_tiles(first_kernel(network.spec, network.variables['params'])), exact=True),
    max_bytes=MAX_BYTES,
  )
  template = page_template('prediction.html')
  one_at_a_time = asyncio.Lock()  # decoding may take 1 GB, and a prediction takes all cores

  def show(request: Request) -> Response:
    del request
    return HTMLResponse(page, headers=_HEADERS)

  async def predict(request: Request) -> Response:
    try:
      async with _upload(request) as upload, one_at_a_time:
        values = await run_in_threadpool(_prediction, network, await upload.read())
    except UnreadableError as error:
      return HTMLResponse(template.render(error=str(error)), status_code=422, headers=_HEADERS)
    return HTMLResponse(template.render(error=None, **values), headers=_HEADERS)

  return Starlette(
    routes=[Route('/', show), Route('/predict', predict, methods=['POST'])],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
  )


_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';"
  " script-src 'unsafe-inline'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'",
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
}


def serve(network: PretrainedModel, host: str, port: int) -> None:
  """Serves the page until it is interrupted.

  Raises:
    UsageError: The port is in use, or the address does not belong to this machine.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listening = socket.socket(family, socket.SOCK_STREAM)
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listening.bind((host, port))
    listening.listen()
  except (OSError, OverflowError) as error:
    listening.close()
    if getattr(error, 'errno', None) == errno.EADDRINUSE:
      raise UsageError(f'port {port} is in use; choose another with --port, or 0 for a free one') from None
    raise UsageError(f'cannot listen on {host}:{port}: {error}') from None
  place = f'[{host}]' if family == socket.AF_INET6 else host
  print(f'http://{place}:{listening.getsockname()[1]} (Ctrl-C stops it)', flush=True)
  hosts = ('localhost', '127.0.0.1', '[::1]') if host in _LOOPBACK else ('*',)
  with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after shutting down
    server(application(network, hosts)).run(sockets=[listening])


def server(app: Starlette) -> uvicorn.Server:
  """Returns a server that bounds the number of connections and how long each lasts."""

  class Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
      super().connection_made(transport)
      self.loop.call_later(_CONNECTION_SECONDS, transport.close)

  options: Any = {'log_level': 'warning', 'limit_concurrency': _CONNECTIONS, 'http': Protocol}
  return uvicorn.Server(uvicorn.Config(app, **options))


@contextlib.asynccontextmanager
async def _upload(request: Request) -> AsyncIterator[UploadFile]:
  """Receives the image of a request, whose size and time are bounded whatever its headers say.

  Raises:
    UnreadableError: It is too large or too slow, or there is none.
  """
  too_large = UnreadableError(f'the image is larger than {MAX_BYTES >> 20} MiB')
  received = 0

  async def receive() -> Message:
    nonlocal received
    message = await request.receive()
    received += len(message.get('body', b''))
    if received > MAX_BYTES + _FORM:
      raise too_large
    return message

  length = request.headers.get('content-length', '0')
  if not length.isdecimal() or int(length) > MAX_BYTES + _FORM:
    raise too_large
  async with contextlib.AsyncExitStack() as stack:
    try:
      async with asyncio.timeout(_BODY_SECONDS):
        form = Request(request.scope, receive).form(max_files=1, max_fields=1)
        upload = (await stack.enter_async_context(form)).get('image')
    except HTTPException as error:  # not a form, or a malformed one
      raise UnreadableError(error.detail) from None
    except TimeoutError:
      raise UnreadableError(f'the image did not arrive within {_BODY_SECONDS:g} seconds') from None
    if not isinstance(upload, UploadFile):
      raise UnreadableError("the form has no file 'image'")
    if (upload.size or 0) > MAX_BYTES:
      raise too_large
    yield upload


def _prediction(network: PretrainedModel, content: bytes) -> dict[str, Any]:
  """Returns the top-5 predictions, the Grad-CAM map, and the channels of every layer.

  Raises:
    UnreadableError: The image has another format, or is damaged.
  """
  spec, head = network.spec, network.spec.head
  view = evaluation_view(read_image(io.BytesIO(content), FORMATS, max_pixels=_MAX_PIXELS), spec)
  layers = [name for name, layer in spec.named_layers() if not isinstance(layer, Flatten | Dropout)]
  (taps,) = feature_batches(network.model, network.variables, [view], layers, batch_size=1)
  best = top_classes(taps[head][0], network.readable_names)
  heat = grad_cam(network.model, network.variables, view[None], np.array([best[0].label]))
  return {
    'view': data_uri(view),
    'grad_cam': data_uri(overlay(view, heat[0])),
    'predictions': best,
    'layers': [
      (name, taps[name].shape[1:], data_uri(channel_tiles(taps[name][0]), exact=True)) for name in layers
    ],
  }
