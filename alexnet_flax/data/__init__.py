"""From a TFDS record to a sharded batch on the devices."""

import functools
from typing import Any


@functools.cache
def import_tensorflow() -> Any:
  """Imports TensorFlow and hides all GPUs from it, which it would take from JAX."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')
  return tf
