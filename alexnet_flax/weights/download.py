"""Weights files by path, by URL and by published name: the digests, and the cache of downloads."""

import hashlib
import logging
import os
import pathlib
import re
import stat
import sys
import time
from typing import Any

from alexnet_flax.errors import UsageError, needs_extra, unknown_name
from alexnet_flax.files import buckets, expanded, without_credentials
from alexnet_flax.files.cache import cache_folder
from alexnet_flax.weights import hub

# Name -> URL and digest. The digests are published with the files: in the file names of torchvision and of
# Geirhos et al. (2019), whose URL is in Brain-Score's model alexnet_trained_on_SIN, in BVLC/caffe's
# models/*/readme.md, and in cvjena/cnn-models' AlexNet_cvgj/model_download_link.txt.
_BVLC = 'http://dl.caffe.berkeleyvision.org'
PUBLISHED: dict[str, tuple[str, str]] = {
  'torchvision': ('https://download.pytorch.org/models/alexnet-owt-7be5be79.pth', '7be5be79'),
  'caffe': (f'{_BVLC}/bvlc_alexnet.caffemodel', '9116a64c0fbe4459d18f4bb6b56d647b63920377'),
  'caffenet': (f'{_BVLC}/bvlc_reference_caffenet.caffemodel', '4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46'),
  'batchnorm_grouped': (
    'https://upload.uni-jena.de/data/58492f883382d6.05749656/alexnet_cvgj_iter_320000.caffemodel',
    'd907ac9b2b3427367b2d7a8ca9bd697b14a38a95f29c1a52fae06f45db3a6369',
  ),
  'stylized_imagenet': (
    'https://bitbucket.org/robert_geirhos/texture-vs-shape-pretrained-models/raw/'
    '0008049cd10f74a944c6d5e90d4639927f8620ae/alexnet_train_60_epochs_lr0.001-b4aa5238.pth.tar',
    'b4aa5238',
  ),
}

_TIMEOUT = 30.0  # seconds without a byte
_MAX_SECONDS, _MAX_BYTES = 4 * 3600.0, 4 * 2**30


def local_path(source: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the file of a path, a URL, a published name or hf:OWNER/NAME; downloads what is not in a cache.

  Of a folder that `hub pull` has written, it is the weights file.

  Raises UsageError if there is no such file or name, or it cannot be downloaded.
  """
  text = os.fspath(source)
  path = expanded(text)
  if os.path.isfile(path):  # pathlib's raises for a name that is too long, as a signed URL is
    return path
  if os.path.isfile(path / hub.WEIGHTS):
    return path / hub.WEIGHTS
  if text.startswith(hub.PREFIX):
    return hub.download(text) / hub.WEIGHTS
  if text in PUBLISHED:
    return downloaded(*PUBLISHED[text])
  if re.match(r'https?://', text):
    return downloaded(text, None)
  if path.suffix or os.sep in text:
    try:
      what = 'a folder, not a weights file' if stat.S_ISDIR(path.stat().st_mode) else 'not a regular file'
    except (FileNotFoundError, NotADirectoryError):
      what = 'no such file'
    except OSError as error:
      what = str(error.strerror)
    raise UsageError(f'{text}: {what}')
  raise unknown_name('weights', text, PUBLISHED, adjective='no file and no published')


def stated_digests(path: pathlib.Path, source: str | os.PathLike[str] = '') -> list[str]:
  """Returns the digests that a file must have: published for the name `source`, by its name, by FILE.sha256.

  Raises UsageError if FILE.sha256 does not hold a digest.
  """
  stated = [PUBLISHED[os.fspath(source)][1]] if os.fspath(source) in PUBLISHED else []
  beside = path.with_name(f'{path.name}.sha256')
  if url := buckets.written_through(beside):  # written in a bucket: it may be there as well
    buckets.local(url)
  if os.path.isfile(beside):
    stated += beside.read_bytes().decode(errors='replace').lower().split()[:1] or ['']
    if not re.fullmatch(r'[0-9a-f]{64}', stated[-1]):
      raise UsageError(f'{beside}: not a SHA-256 digest')
  return stated + _digests_in_name(path.name)


def check_digests(content: bytes, digests: list[str], source: str) -> None:
  """Raises UsageError, which names the source, if the content has another digest."""
  for digest in digests:
    kind = 'sha1' if len(digest) == 40 else 'sha256'
    found = hashlib.new(kind, content).hexdigest()[: len(digest)]
    if found != digest:
      advice = 'download it again, or give it another name if the number in the name is no digest'
      raise UsageError(f'{source}: wrong digest: its {kind} is {found}, not {digest}; {advice}')


def _digests_in_name(name: str) -> list[str]:
  """The digest in 'alexnet-owt-7be5be79.pth', as PyTorch's hub writes it; not a date or another number."""
  return re.findall(r'-(?!\d+\.)([0-9a-f]{8,64})\.pth?(?:\.tar)?$', name)


def downloaded(url: str, digest: str | None) -> pathlib.Path:
  """Returns the file of a URL in the cache, where pooch moves it when all has come and the digest is right.

  If `digest` is None, that in the file's name counts, if there is one. Raises UsageError if the file cannot
  be downloaded, or has another digest.
  """
  cache = cache_folder()
  folder = cache / hashlib.sha256(url.encode()).hexdigest()[:8]  # two hosts may have files of one name
  shown = without_credentials(url)
  path = folder / (pathlib.PurePosixPath(shown.split('/', 3)[-1]).name.lstrip('.') or 'weights')
  if path.is_file():
    return path
  with needs_extra(f'downloading {shown}'):
    import pooch
    import requests
    import urllib3

  stated = [digest] if digest else _digests_in_name(path.name)  # often a prefix, which pooch cannot check

  def fetch(url: str, partial: str, _: Any) -> None:
    _fetch(url, pathlib.Path(partial), length_needed=not stated)
    check_digests(pathlib.Path(partial).read_bytes(), stated, shown)

  pooch.get_logger().setLevel(logging.WARNING)
  try:
    pooch.retrieve(url, None, fname=path.name, path=folder, downloader=fetch)
  except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
    cause: BaseException = error  # the first one: 'Connection refused', not those that pass it on
    while cause.__context__ is not None:
      cause = cause.__context__
    reason = getattr(cause, 'strerror', None) or ' '.join(str(cause).split()).replace(url, shown)
    if '@' in reason:  # a part of the URL
      reason = type(error).__name__
    advice = 'download it by hand and give its path'
    raise UsageError(f'cannot download {shown}: {reason}; {advice}') from None
  except OSError as error:
    raise UsageError(f'cannot download {shown} to {cache}: {error.strerror or error}') from None
  return path


def _fetch(url: str, path: pathlib.Path, length_needed: bool) -> None:
  """Downloads a file; ValueError if it is too large, too slow, cut short, or may be cut short unnoticed."""
  import requests
  from tqdm import tqdm

  start, plain = time.monotonic(), {'Accept-Encoding': 'identity'}
  with requests.get(url, stream=True, timeout=_TIMEOUT, headers=plain) as response, path.open('wb') as file:
    if response.status_code != 200:
      raise ValueError(f'{response.status_code} {response.reason}')
    length, encoding = (response.headers.get(name) for name in ('Content-Length', 'Transfer-Encoding'))
    if length is None and encoding is None and length_needed:
      raise ValueError('the server does not state its length, so that a cut file could not be recognised')
    total, hidden = length and int(length), not sys.stderr.isatty()
    with tqdm(total=total, unit='B', unit_scale=True, disable=hidden) as bar:
      # read1 returns what has come, so that a slow server cannot hold this loop; urllib3 compares the length.
      while block := response.raw.read1(1 << 20, decode_content=True):
        file.write(block)
        bar.update(len(block))
        if file.tell() > _MAX_BYTES:
          raise ValueError(f'it has more than {_MAX_BYTES:,} bytes')
        if time.monotonic() - start > _MAX_SECONDS:
          raise ValueError(f'it takes more than {_MAX_SECONDS / 3600:g} hours')
