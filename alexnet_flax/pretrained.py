"""Networks that have been trained: of a run's folder, a weights file, a URL or a published name."""

import json
import os
import pathlib
from typing import Any

from alexnet_flax import checkpoint
from alexnet_flax.config import Config, network
from alexnet_flax.config_dict import from_config_dict
from alexnet_flax.errors import UsageError, unknown_name
from alexnet_flax.specs import Spec
from alexnet_flax.variants import VARIANTS
from alexnet_flax.weights import load_weights, stored_spec


def load_pretrained(source: str | os.PathLike[str], spec: Spec | None = None) -> tuple[Spec, dict[str, Any]]:
  """A trained network and its variables.

  Args:
    source: a run's folder (its last checkpoint; the moving averages, if it has them), or what
      `load_weights` takes.
    spec: the network of a weights file, unless the file itself says; if None, the variant that it can
      be of.

  Raises:
    UsageError: there is no such source, it cannot be read, or it is not clear which network it is of.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return _of_run(folder)
  theirs = stored_spec(source, {} if spec else VARIANTS) or spec
  if theirs is None:
    raise UsageError(f'{source}: of none of the known networks; name its variant')
  return theirs, load_weights(source, theirs)


def load_variant(
  source: str, variant: str | None, width: float = 1.0, image_size: int | None = None
) -> tuple[Spec, dict[str, Any]]:
  """The same, of a variant by name and scaled.

  Raises:
    UsageError: as above, or there is no such variant, or the source says itself that it is of another.
  """
  if variant is not None and variant not in VARIANTS:
    raise unknown_name('variant', variant, VARIANTS)
  asked = variant is not None or width != 1 or image_size is not None
  if not asked or pathlib.Path(source).expanduser().is_dir():
    spec, variables = load_pretrained(source)
  else:
    known = VARIANTS[variant] if variant else stored_spec(source, VARIANTS)
    try:
      spec, variables = load_pretrained(source, known and known.scaled(width, image_size))
    except ValueError as error:
      raise UsageError(str(error)) from None
  if variant not in (None, spec.name):
    raise UsageError(f'{source} holds {spec.name}, not --variant={variant}')
  if image_size not in (None, spec.image_size):
    raise UsageError(f'{source} is for {spec.image_size}x{spec.image_size}, not --image_size={image_size}')
  return spec, variables


def run_config(folder: str | os.PathLike[str]) -> Config:
  """The configuration of a run's folder.

  Raises:
    UsageError: there is none.
  """
  path = pathlib.Path(folder).expanduser() / 'config.json'
  try:
    return from_config_dict(json.loads(path.read_text()))
  except (OSError, ValueError) as error:
    raise UsageError(f"{folder} is no run's folder: {path.name}: {error}") from None


def _of_run(folder: pathlib.Path) -> tuple[Spec, dict[str, Any]]:
  config = run_config(folder)
  _, variables = checkpoint.restore_variables(folder / 'checkpoints')
  return network(config), variables
