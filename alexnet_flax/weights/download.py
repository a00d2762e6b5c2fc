"""Weights files by path, by URL and by published name: the digests, and the cache of downloads."""

import hashlib
import logging
import os
import pathlib
import re
import sys
from typing import Any

from alexnet_flax.errors import UsageError, needs_extra, unknown_name

# Name -> URL and digest. The digests are published with the files: in torchvision's file name, in
# BVLC/caffe's models/*/readme.md, and in cvjena/cnn-models' AlexNet_cvgj/model_download_link.txt.
PUBLISHED: dict[str, tuple[str, str]] = {
  'torchvision': ('https://download.pytorch.org/models/alexnet-owt-7be5be79.pth', '7be5be79'),
  'caffe': (
    'http://dl.caffe.berkeleyvision.org/bvlc_alexnet.caffemodel',
    '9116a64c0fbe4459d18f4bb6b56d647b63920377',
  ),
  'caffenet': (
    'http://dl.caffe.berkeleyvision.org/bvlc_reference_caffenet.caffemodel',
    '4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46',
  ),
  'batchnorm_grouped': (
    'https://upload.uni-jena.de/data/58492f883382d6.05749656/alexnet_cvgj_iter_320000.caffemodel',
    'd907ac9b2b3427367b2d7a8ca9bd697b14a38a95f29c1a52fae06f45db3a6369',
  ),
}


def local_path(source: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the file of a path, a URL or a published name; downloads it unless it is in the cache.

  Raises:
    UsageError: There is no such file or name, or it cannot be downloaded.
  """
  text = os.fspath(source)
  path = pathlib.Path(text).expanduser()
  if path.is_file():
    return path
  if text in PUBLISHED:
    return _downloaded(*PUBLISHED[text])
  if re.match(r'https?://', text):
    return _downloaded(text, None)
  if path.suffix or os.sep in text:
    raise UsageError(f'{text}: {"a folder, not a weights file" if path.is_dir() else "no such file"}')
  raise unknown_name('weights', text, PUBLISHED, adjective='no file and no published')


def verify_digest(source: str | os.PathLike[str], path: pathlib.Path, content: bytes) -> None:
  """Checks the published digest, the one in the file's name (NAME-DIGEST.pth), and FILE.sha256 beside it.

  Raises:
    UsageError: The content has another digest.
  """
  published = [PUBLISHED[os.fspath(source)][1]] if os.fspath(source) in PUBLISHED else []
  _check_digests(content, [*published, *stated_digests(path)], str(path))


def stated_digests(path: pathlib.Path) -> list[str]:
  """Returns the digests that a file must have: by FILE.sha256 beside it, and by its name.

  Raises:
    UsageError: FILE.sha256 does not hold a digest.
  """
  beside = path.with_name(f'{path.name}.sha256')
  if not beside.is_file():
    return _digests_in_name(path.name)
  stated = beside.read_bytes().decode(errors='replace').lower().split()[:1]
  if not re.fullmatch(r'[0-9a-f]{64}', ''.join(stated)):
    raise UsageError(f'{beside}: not a SHA-256 digest')
  return stated + _digests_in_name(path.name)


def _check_digests(content: bytes, digests: list[str], source: str) -> None:
  for digest in digests:
    kind = 'sha1' if len(digest) == 40 else 'sha256'
    found = hashlib.new(kind, content).hexdigest()[: len(digest)]
    if found != digest:
      raise UsageError(f'{source}: wrong digest: its {kind} is {found}, not {digest}; download it again')


def _digests_in_name(name: str) -> list[str]:
  """The digest in 'alexnet-owt-7be5be79.pth', as PyTorch's hub writes it; not a date or another number."""
  return re.findall(r'-(?!\d+\.)([0-9a-f]{8,64})\.[a-z0-9.]+$', name)


def _downloaded(url: str, digest: str | None) -> pathlib.Path:
  """The file in the cache; pooch moves it there when all of it has come and the digest is right."""
  cache = pathlib.Path(os.environ.get('ALEXNET_FLAX_CACHE', '~/.cache/alexnet_flax')).expanduser()
  folder = cache / hashlib.sha256(url.encode()).hexdigest()[:8]  # two hosts may have files of one name
  path = folder / pathlib.PurePosixPath(url.partition('?')[0]).name
  if path.is_file():
    return path
  with needs_extra(f'downloading {url}'):
    import pooch
    import requests

  fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20)

  def fetch_and_check(url: str, partial: str, owner: Any) -> None:
    fetch(url, partial, owner)
    stated = [digest] if digest else _digests_in_name(path.name)  # often a prefix, which pooch cannot check
    _check_digests(pathlib.Path(partial).read_bytes(), stated, url)

  pooch.get_logger().setLevel(logging.WARNING)
  try:
    pooch.retrieve(url, None, fname=path.name, path=folder, downloader=fetch_and_check)
  except (requests.RequestException, ValueError) as error:
    advice = 'download it by hand and give its path'
    raise UsageError(f'cannot download {url}: {_reason(error)}; {advice}') from None
  except OSError as error:
    raise UsageError(f'cannot download {url} to {cache}: {error}') from None
  return path


def _reason(error: BaseException) -> str:
  """The first cause of an error in a line: 'Connection refused', not the chain of those who pass it on."""
  while error.__context__ is not None:
    error = error.__context__
  return getattr(error, 'strerror', None) or ' '.join(str(error).split())
