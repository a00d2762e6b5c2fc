"""Weights files by path, by URL, and by a published name; digests; the cache."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.request

from tqdm import tqdm

from alexnet_flax.errors import UsageError, unknown_name

# Name -> URL and digest. The digests stand where the files are published: in torchvision's file name,
# in BVLC/caffe's models/*/readme.md, and in cvjena/cnn-models' AlexNet_cvgj/model_download_link.txt.
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
_TIMEOUT_SECONDS = 30


def local_path(source: str | os.PathLike[str]) -> pathlib.Path:
  """The file of a path, of a URL or of a published name, downloaded if it is not in the cache yet.

  Raises:
    UsageError: there is no such file or name, or it cannot be downloaded.
  """
  text = os.fspath(source)
  path = pathlib.Path(text).expanduser()
  if path.is_file():
    return path
  if text in PUBLISHED:
    url, digest = PUBLISHED[text]
    return _downloaded(url, digest)
  if re.match(r'https?://', text):
    return _downloaded(text, None)
  if path.suffix or os.sep in text:
    raise UsageError(f'{text}: {"a folder, not a weights file" if path.is_dir() else "no such file"}')
  raise unknown_name('weights', text, PUBLISHED, adjective='no file and no published')


def verify_digest(source: str | os.PathLike[str], path: pathlib.Path, content: bytes) -> None:
  """Checks the published digest, the one in the file's name (NAME-DIGEST.pth), and FILE.sha256 beside it.

  Raises:
    UsageError: the content has another.
  """
  published = [PUBLISHED[os.fspath(source)][1]] if os.fspath(source) in PUBLISHED else []
  for digest in [*published, *stated_digests(path)]:
    _check_digest(content, digest, str(path))


def stated_digests(path: pathlib.Path) -> list[str]:
  """The digests that a file must have by FILE.sha256 beside it and by its name.

  Raises:
    UsageError: what lies beside it is no digest.
  """
  beside = path.with_name(f'{path.name}.sha256')
  try:
    stated = beside.read_text().split()[0].lower() if beside.is_file() else None
  except (IndexError, UnicodeDecodeError):
    stated = ''
  if stated is not None and not re.fullmatch(r'[0-9a-f]{64}', stated):
    raise UsageError(f'{beside}: not a SHA-256 digest')
  return [digest for digest in (stated, _digest_in_name(path.name)) if digest]


def _check_digest(content: bytes, digest: str, source: str) -> None:
  kind = 'sha1' if len(digest) == 40 else 'sha256'
  found = hashlib.new(kind, content).hexdigest()
  if not found.startswith(digest):
    raise UsageError(
      f'{source}: wrong digest: its {kind} is {found[: max(len(digest), 8)]}, not {digest}; download it anew'
    )


def _digest_in_name(name: str) -> str | None:
  """The digest in 'alexnet-owt-7be5be79.pth', PyTorch's hub's way; a date or a number is none."""
  match = re.search(r'-(?!\d+\.)([0-9a-f]{8,64})\.[a-z0-9.]+$', name)
  return match[1] if match else None


def _downloaded(url: str, digest: str | None) -> pathlib.Path:
  cache = pathlib.Path(os.environ.get('ALEXNET_FLAX_CACHE', '~/.cache/alexnet_flax')).expanduser()
  # Two hosts may have files of one name.
  place = hashlib.sha256(url.encode()).hexdigest()[:8]
  path = cache / place / pathlib.PurePosixPath(url.partition('?')[0]).name
  digest = digest or _digest_in_name(path.name)
  if path.is_file():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.partial-{os.getpid()}-{path.name}')
    try:
      _fetch(url, partial)
      if digest:
        _check_digest(partial.read_bytes(), digest, url)
      partial.replace(path)
    finally:
      partial.unlink(missing_ok=True)
  except (urllib.error.URLError, http.client.HTTPException, ValueError) as error:
    reason = getattr(error, 'reason', error)
    raise UsageError(f'cannot download {url}: {reason}; download it by hand and give its path') from None
  except OSError as error:
    raise UsageError(f'cannot download {url} to {cache}: {error}') from None
  return path


def _fetch(url: str, path: pathlib.Path) -> None:
  with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, path.open('wb') as file:
    total = int(response.headers.get('Content-Length') or 0) or None
    with tqdm(total=total, unit='B', unit_scale=True, desc=path.name.split('-', 2)[-1]) as bar:
      while block := response.read(1 << 20):
        file.write(block)
        bar.update(len(block))
    if total and path.stat().st_size != total:
      raise UsageError(f'cannot download {url}: {path.stat().st_size:,} of {total:,} bytes came')
