"""Which examples a step holds, and every random number of their views: pure functions of (seed, step).

The numbers are raw outputs of the counter-based generator Philox (Salmon et al. 2011), whose stream
NumPy guarantees not to change. Nothing is carried from one step to the next, so any step can be
asked for at once, by any process.
"""

import functools

import numpy as np

_PERMUTATIONS, _VIEWS = range(2)  # independent streams of one seed


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
  """The examples of a training step, int64 [batch_size].

  Training is one endless stream of permutations: position p of the stream is example
  permutation(p // num_examples)[p % num_examples]. Every example comes once an epoch, and a batch may
  straddle two epochs.
  """
  positions = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(positions, num_examples)
  indices = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    chosen = epochs == epoch
    indices[chosen] = _permutation(seed, int(epoch), num_examples)[offsets[chosen]]
  return indices


def view_numbers(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
  """Uniform numbers in [0, 1) for the views of a step's examples, float32 [batch_size, count]."""
  raw = _philox(seed, _VIEWS, step).random_raw(batch_size * count)
  # float32 holds 24 bits exactly, so no number is rounded up to 1.
  return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).reshape(batch_size, count)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """A uniform permutation: random 64-bit keys, sorted."""
  keys = _philox(seed, _PERMUTATIONS, epoch).random_raw(num_examples)
  return np.argsort(keys, kind='stable')


def _philox(seed: int, stream: int, index: int) -> np.random.Philox:
  # The generator counts up in the first word alone, so these blocks never meet.
  return np.random.Philox(key=[seed, 0], counter=[0, 0, stream, index])
