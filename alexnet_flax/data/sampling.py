"""The examples of a step and the random numbers of their views, as pure functions of (seed, step).

The numbers are raw outputs of the counter-based generator Philox (Salmon et al. 2011), whose stream
NumPy guarantees not to change. No state passes from one step to the next, so any process can compute any
step directly.
"""

import functools

import numpy as np

_PERMUTATIONS, _VIEWS = range(2)  # independent streams of one seed


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
  """Returns the examples of a training step, int64 [batch_size].

  Training is one endless stream of permutations: position p of the stream is example
  permutation(p // num_examples)[p % num_examples]. Every example occurs once per epoch, and a batch may
  span two epochs.
  """
  epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_examples)
  parts = (_permutation(seed, int(e), num_examples)[offsets[epochs == e]] for e in np.unique(epochs))
  return np.concatenate(list(parts))


def view_numbers(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
  """Returns uniform numbers in [0, 1) for the views of a step's examples, float32 [batch_size, count]."""
  raw = _philox(seed, _VIEWS, step).random_raw(batch_size * count)
  # float32 holds 24 bits exactly, so no number is rounded up to 1.
  return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(batch_size, count)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns a uniform permutation, by sorting random 64-bit keys."""
  return np.argsort(_philox(seed, _PERMUTATIONS, epoch).random_raw(num_examples), kind='stable')


def _philox(seed: int, stream: int, index: int) -> np.random.Philox:
  # The generator only increments the first word of the counter, so these blocks never overlap.
  return np.random.Philox(key=[seed, 0], counter=[0, 0, stream, index])
