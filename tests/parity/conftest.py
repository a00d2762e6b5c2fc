"""Collects the greatest error of each comparison, and prints them as docs/parity.md has them."""

import contextlib
import os

import pytest

with contextlib.suppress(ImportError):
  import torchvision  # noqa: F401  # before TensorFlow, after which Triton's import crashes

import numpy as np
from sklearn.datasets import load_sample_images

_ROWS: list[str] = []
TOLERANCE = 1e-4
FULL_SIZE = 'PARITY_AT_FULL_SIZE' in os.environ  # as `make test-peers` sets it: up to 4 GB of memory


@pytest.fixture(scope='session')
def photographs() -> list[np.ndarray]:
  """Two photographs, uint8 [427, 640, 3], that come with scikit-learn."""
  return load_sample_images().images


@pytest.fixture(scope='session')
def sized():
  """sized(spec): at a quarter of its width, unless the networks are compared at full size."""
  return lambda spec: spec if FULL_SIZE else spec.scaled(1 / 4)


@pytest.fixture
def agree(request):
  """agree(program, what, errors): all of them are within the tolerance; the greatest is reported."""

  def check(program: str, what: str, errors: dict[str, float]) -> None:
    worst = max(errors, key=lambda name: errors[name])
    size = '' if FULL_SIZE else ', width 1/4'
    _ROWS.append(f'| {program} | {what}{size} | {len(errors)} | {errors[worst]:.1e} | {worst} |')
    too_great = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not too_great

  return check


def pytest_terminal_summary(terminalreporter) -> None:
  if _ROWS:
    terminalreporter.section('greatest |a - b| / greatest |b|')
    for row in ['| program | what | tensors | greatest error | at |', '|---|---|---|---|---|', *_ROWS]:
      terminalreporter.write_line(row)
