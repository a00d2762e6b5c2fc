"""Several seeds in one program: an experiment and a folder for each, and their steps made together."""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from alexnet_flax.config import Config
from alexnet_flax.errors import UsageError
from alexnet_flax.training.experiment import Experiment, build_experiment
from alexnet_flax.training.loop import Request, Result, make_steps
from alexnet_flax.training.workdir import CONFIG

_PREFIX = 'seed-'


def build_experiments(config: Config) -> list[Experiment]:
  """Builds the experiments of `num_seeds` seeds from `seed` on; they share model, optimizer and steps.

  Raises:
    UsageError: The configuration does not fit the data or the devices.
  """
  count = config.num_seeds
  if count > 1 and (jax.process_count() > 1 or config.mesh.model > 1):
    raise UsageError(f'num_seeds (={count}) needs one process and mesh.model=1; train the seeds one by one')
  if count > 1 and config.profile_steps:
    raise UsageError(f'profile_steps (={config.profile_steps}) traces one run; train it with num_seeds=1')
  first = build_experiment(dataclasses.replace(config, num_seeds=1))
  experiments = [first]
  for seed in range(config.seed + 1, config.seed + count):
    experiments.append(build_experiment(dataclasses.replace(config, num_seeds=1, seed=seed), like=first))
  return experiments


def run_folders(folder: pathlib.Path, config: Config) -> list[pathlib.Path]:
  """Returns the folder of each seed's run: with one seed `folder`, with several `folder`/seed-SEED.

  Raises:
    UsageError: The folder holds the runs of the other kind.
  """
  seeds = range(config.seed, config.seed + config.num_seeds)
  if len(seeds) == 1:
    if seed_folders(folder):
      raise UsageError(f'{folder} holds the runs of several seeds (num_seeds); use another --workdir')
    return [folder]
  if (folder / CONFIG).exists():
    raise UsageError(
      f'{folder} holds the run of one seed, not of num_seeds={len(seeds)}; use another --workdir'
    )
  return [folder / f'{_PREFIX}{seed}' for seed in seeds]


def seed_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of the runs of several seeds, if the folder holds such."""
  return sorted(place.parent for place in folder.glob(f'{_PREFIX}*/{CONFIG}'))


def joint_steps(experiment: Experiment) -> Callable[[Sequence[Request]], list[Result]]:
  """Returns what makes the steps of several seeds by one program, `vmap` over states and batches."""
  steps, replicated = experiment.steps, experiment.steps.replicated
  step = jax.vmap(cast(Any, steps.train).__wrapped__)

  def make(states: list[Any], others: list[Any]) -> list[Result]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(states, others, strict=True))
    results = step(stacked[0], *stacked[1])
    return [jax.tree.map(operator.itemgetter(number), results) for number in range(len(states))]

  @functools.cache
  def compiled(count: int) -> Callable[..., list[Result]]:
    shardings = [(steps.state, replicated, replicated, replicated)] * count
    return jax.jit(make, donate_argnums=0, out_shardings=shardings, compiler_options=steps.compiler_options)

  def together(requests: Sequence[Request]) -> list[Result]:
    if len(requests) == 1:
      return make_steps(requests)
    states, others = zip(*((one.arguments[0], one.arguments[1:]) for one in requests), strict=True)
    return compiled(len(requests))(list(states), list(others))

  return together


def steps_maker(experiment: Experiment, count: int) -> Callable[[Sequence[Request]], list[Result]]:
  """Returns what makes the steps of several seeds.

  That is one program, but on CPUs, where convolutions with a batch of kernels are slow: there each seed has
  its own, and they are computed at the same time.
  """
  if count == 1:
    return make_steps
  on_cpu = experiment.steps.sharding.mesh.devices.flat[0].platform == 'cpu'
  return make_steps if on_cpu else joint_steps(experiment)
