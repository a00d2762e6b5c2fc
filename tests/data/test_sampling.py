"""The training order: coverage, dependence on seed and step alone, and mixing."""

import numpy as np
import pytest

from alexnet_flax.data.sampling import batch_indices, view_numbers


@pytest.mark.parametrize(('num_examples', 'batch_size'), [(10, 10), (10, 4), (7, 16), (100, 32)])
def test_every_example_occurs_once_per_epoch(num_examples, batch_size):
  steps = 4 * num_examples
  stream = np.concatenate([batch_indices(3, step, batch_size, num_examples) for step in range(steps)])
  for epoch in range(len(stream) // num_examples):
    part = stream[epoch * num_examples : (epoch + 1) * num_examples]
    np.testing.assert_array_equal(np.sort(part), np.arange(num_examples))


def test_seed_and_epoch_change_the_permutation():
  first = batch_indices(0, 0, 1000, 1000)
  np.testing.assert_array_equal(first, batch_indices(0, 0, 1000, 1000))
  for other in (batch_indices(1, 0, 1000, 1000), batch_indices(0, 1, 1000, 1000)):
    assert (first == other).mean() < 0.02


def test_the_stream_does_not_depend_on_earlier_calls():
  later = batch_indices(0, 10**6, 256, 1_281_167)
  batch_indices(0, 5, 256, 1_281_167)
  np.testing.assert_array_equal(later, batch_indices(0, 10**6, 256, 1_281_167))


def test_positions_are_uniform():
  """The position of example 0 of 10 over 2,000 epochs: each position 200 times, within 5 sigma."""
  stream = batch_indices(0, 0, 20_000, 10).reshape(2000, 10)
  counts = (stream == 0).sum(0)
  assert np.abs(counts - 200).max() < 5 * 200**0.5


def test_pinned():
  """The stream defines the batches of every run, so these numbers may never change."""
  assert batch_indices(0, 0, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
  expected = np.array([0.6436367034912109, 0.06352794170379639, 0.12032335996627808], np.float32)
  np.testing.assert_array_equal(view_numbers(0, 0, 1, 3)[0], expected)


def test_view_numbers_are_uniform_and_differ_by_step_and_seed():
  numbers = view_numbers(0, 0, 1000, 23)
  assert numbers.dtype == np.float32
  assert numbers.shape == (1000, 23)
  assert 0 <= numbers.min() < 1e-3
  assert 1 - 1e-3 < numbers.max() < 1
  assert numbers.mean() == pytest.approx(0.5, abs=0.01)
  for other in (view_numbers(0, 1, 1000, 23), view_numbers(1, 0, 1000, 23)):
    assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.03
