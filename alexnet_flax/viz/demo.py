"""`alexnet-flax demo`: a web page that classifies images, by default for this machine only."""

import contextlib
import errno
import io
import socket
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from alexnet_flax.data.images import UnreadableError, evaluation_view, read_image
from alexnet_flax.errors import UsageError
from alexnet_flax.inference.features import feature_batches
from alexnet_flax.inference.grad_cam import grad_cam, overlay
from alexnet_flax.models.spec import Dropout, Flatten
from alexnet_flax.pretrained import PretrainedModel, top_classes
from alexnet_flax.viz.figures import channel_tiles, data_uri, filter_tiles, first_kernel, page_template

MAX_BYTES = 20 << 20
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
    filters=data_uri(filter_tiles(first_kernel(network.spec, network.variables['params'])), exact=True),
    max_bytes=MAX_BYTES,
  )
  template = page_template('prediction.html')

  def show(request: Request) -> Response:
    del request
    return HTMLResponse(page, headers=_HEADERS)

  async def predict(request: Request) -> Response:
    try:
      image = await _uploaded(request)
      values = await run_in_threadpool(_prediction, network, image)
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
  server = uvicorn.Server(
    uvicorn.Config(application(network, hosts), log_level='warning', limit_concurrency=16)
  )
  with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after shutting down
    server.run(sockets=[listening])


async def _uploaded(request: Request) -> np.ndarray:
  """Reads the image of a request as uint8 RGB.

  Raises:
    UnreadableError: It is too large, has another format, or is damaged.
  """
  too_large = UnreadableError(f'the image is larger than {MAX_BYTES >> 20} MiB')
  length = request.headers.get('content-length', '')
  if not length.isdigit():
    raise UnreadableError('the request has no content length')
  if int(length) > MAX_BYTES + 4096:
    raise too_large
  try:
    async with request.form(max_files=1, max_fields=1) as form:
      upload: Any = form.get('image')
      if upload is None or isinstance(upload, str):
        raise UnreadableError("the form has no file 'image'")
      content = await upload.read(MAX_BYTES + 1)
  except HTTPException as error:  # not a form, or a malformed one
    raise UnreadableError(error.detail) from None
  if len(content) > MAX_BYTES:
    raise too_large
  return await run_in_threadpool(read_image, io.BytesIO(content), FORMATS)


def _prediction(network: PretrainedModel, image: np.ndarray) -> dict[str, Any]:
  """Returns the top-5 predictions, the Grad-CAM map, and the channels of every layer."""
  spec, head = network.spec, network.spec.head
  view = evaluation_view(image, spec)
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
