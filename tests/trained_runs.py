"""A run on the embedded digits that several tests look at, trained once for each process of a test run."""

import functools
import pathlib
import tempfile

import jax

from alexnet_flax import training
from tests.test_training import TINY, replace


@functools.cache
def digits_run(data_dir: str, seed: int = 0) -> pathlib.Path:
  """The folder of a run of 20 steps, with its report."""
  folder = pathlib.Path(tempfile.mkdtemp()) / f'digits-{seed}'
  config = replace(
    TINY,
    data={'data_dir': data_dir, 'train_split': 'train[:320]'},
    total_epochs=1.0,
    log_every_steps=5,
    eval_every_steps=10,
    seed=seed,
    report=seed == 0,
  )
  with jax.numpy_dtype_promotion('standard'):
    training.train(config, folder)
  return folder
