"""The configuration as a `ConfigDict`, whose every key the command line can override, and strictly back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict as ml_config_dict

from alexnet_flax.config import Config, all_keys, typed_fields
from alexnet_flax.config_check import check
from alexnet_flax.errors import UsageError, unknown_name


def config_dict(config: Config) -> ml_collections.ConfigDict:
  """The same as a typed ConfigDict in which every key can be overridden, those that are None too."""

  def convert(value: Any) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field, kind in typed_fields(type(value)):
      item = getattr(value, field)
      if dataclasses.is_dataclass(item):
        item = convert(item)
      elif item is None:
        item = ml_config_dict.placeholder(_plain_types(kind)[0])
      result[field] = item
    return result

  return convert(config)


def from_config_dict(values: Mapping[str, Any]) -> Config:
  """The configuration in a (possibly nested) mapping, checked.

  Raises:
    UsageError: a key or name is unknown, a value has the wrong type, or values contradict another.
  """
  config = _build(Config, values, '')
  check(config)
  return config


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
  known = dict(typed_fields(kind))
  arguments = {}
  for key, value in values.items():
    if key not in known:
      raise unknown_name('configuration key', prefix + key, all_keys())
    inner = known[key]
    if dataclasses.is_dataclass(inner):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UsageError(f'{prefix}{key} (={value!r}) must be a group of keys')
      arguments[key] = _build(typing.cast(type, inner), value, f'{prefix}{key}.')
    else:
      arguments[key] = _typed(prefix + key, value, inner)
  return kind(**arguments)


def _typed(key: str, value: Any, kind: Any) -> Any:
  """The value as its field's type: whole numbers may stand for floats, lists for tuples."""
  for plain in _plain_types(kind):
    if plain is tuple and isinstance(value, tuple | list):
      if all(type(item) in (int, float) for item in value) and _right_length(value, kind):
        return tuple(map(float, value))
    elif plain is float and type(value) is int:
      return float(value)
    elif type(value) is plain:
      return value
  if value is None and types.NoneType in typing.get_args(kind):
    return None
  wanted = str(kind) if not isinstance(kind, type) else kind.__name__
  raise UsageError(f'{key} (={value!r}) must be of type {wanted}')


def _right_length(value: Any, kind: Any) -> bool:
  items = typing.get_args(kind)
  return Ellipsis in items or len(items) == len(value)


def _plain_types(kind: Any) -> list[type]:
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  return [typing.get_origin(one) or one for one in kinds if one is not types.NoneType]
