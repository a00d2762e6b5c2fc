"""Optimizers by name, learning-rate schedules, and the per-layer multipliers of the specs."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import jax
import optax

from alexnet_flax.models.spec import Multipliers, Spec

ScheduleName = Literal['constant', 'step', 'cosine', 'polynomial']
Transformations = tuple[optax.GradientTransformation, ...]


def _sgd(settings: 'OptimizerConfig', rate: optax.ScalarOrSchedule, decay: Any) -> Transformations:
  dtype = settings.momentum_dtype
  return decay, optax.sgd(rate, settings.momentum, settings.nesterov, accumulator_dtype=dtype)


def _adamw(settings: 'OptimizerConfig', rate: optax.ScalarOrSchedule, decay: Any) -> Transformations:
  dtype = settings.momentum_dtype
  scale = optax.scale_by_adam(b1=settings.momentum, nesterov=settings.nesterov, mu_dtype=dtype)
  return scale, decay, optax.scale_by_learning_rate(rate)


def _lars(settings: 'OptimizerConfig', rate: optax.ScalarOrSchedule, decay: Any) -> Transformations:
  trust = optax.scale_by_trust_ratio(trust_coefficient=0.001)
  momentum = optax.trace(settings.momentum, settings.nesterov, settings.momentum_dtype)
  return decay, trust, optax.scale_by_learning_rate(rate), momentum  # optax.lars, with the specs' decay


# Each turns settings, a learning rate and the weight decay (which reads the specs' multipliers) into a chain.
OPTIMIZERS: dict[str, Callable[['OptimizerConfig', optax.ScalarOrSchedule, Any], Transformations]] = {
  'sgd': _sgd,
  'adamw': _adamw,
  'lars': _lars,
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its learning rate. A number of steps, where set, replaces the same duration in epochs.

  Attributes:
    name: 'sgd' (with momentum); 'adamw' (Loshchilov and Hutter 2017; `momentum` is its beta1); or 'lars',
      for batches of thousands (You et al. 2017, arXiv:1708.03888): the update of each parameter is a
      thousandth of its norm, times the rate.
    learning_rate: The peak rate, at the end of the linear warm-up (of `warmup_epochs` or `warmup_steps`).
    schedule: The course after the warm-up; see `learning_rate_schedule`.
    boundary_epochs: The epochs at which the schedule 'step' multiplies the rate by `decay_factor`.
    decay_power: The power of the schedule 'polynomial'; 1 is linear.
    end_learning_rate: The rate at the end of 'cosine' and 'polynomial'.
    momentum, nesterov, weight_decay, clip_norm: See `sgd`.
    momentum_dtype: The type in which the momentum is kept from step to step; parameters are float32.
    accumulate_steps: The number of micro-batches of a step.
    ema_decay: The decay of the weights' exponential moving averages; None for none.
  """

  name: str = dataclasses.field(default='sgd', metadata={'choices': OPTIMIZERS})
  learning_rate: float = 0.01
  schedule: ScheduleName = 'cosine'
  warmup_epochs: float = 0.0
  warmup_steps: int | None = None
  boundary_epochs: tuple[float, ...] = ()
  decay_factor: float = 0.1
  decay_power: float = 1.0
  end_learning_rate: float = 0.0
  momentum: float = dataclasses.field(default=0.9, metadata={'below': 1})
  nesterov: bool = False
  momentum_dtype: Literal['float32', 'bfloat16'] = 'float32'
  weight_decay: float = 5e-4
  clip_norm: float | None = dataclasses.field(default=None, metadata={'above': 0})
  accumulate_steps: int = dataclasses.field(default=1, metadata={'at_least': 1})
  ema_decay: float | None = dataclasses.field(default=None, metadata={'below': 1})

  def __post_init__(self) -> None:
    boundaries = self.boundary_epochs
    if self.schedule == 'step' and not boundaries:
      raise ValueError("schedule='step' needs boundary_epochs, for example (30, 60)")
    if any(epoch <= 0 for epoch in boundaries) or list(boundaries) != sorted(boundaries):
      raise ValueError(f'boundary_epochs (={boundaries}) must be positive and ascending')

  def rate_by_step(self, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Raises:
      ValueError: The warm-up is not shorter than the run.
    """
    warmup = round(self.warmup_epochs * steps_per_epoch) if self.warmup_steps is None else self.warmup_steps
    return learning_rate_schedule(
      self.schedule,
      self.learning_rate,
      total_steps,
      warmup_steps=warmup,
      boundaries=[round(epoch * steps_per_epoch) for epoch in self.boundary_epochs],
      factor=self.decay_factor,
      power=self.decay_power,
      end=self.end_learning_rate,
    )


def learning_rate_schedule(
  name: ScheduleName,
  peak: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  boundaries: Sequence[int] = (),
  factor: float = 0.1,
  power: float = 1.0,
  end: float = 0.0,
) -> optax.Schedule:
  """Returns the learning rate by step: a linear rise to `peak` over `warmup_steps`, then a named course.

  Args:
    name: 'constant'; 'step' (times `factor` at each of `boundaries`); 'cosine' or 'polynomial' (of `power`; 1
      is linear), which fall from `peak` to `end` at `total_steps`.
    total_steps: The length of the run, warm-up included.
    boundaries: Steps, counted from the start of the run.
    peak, warmup_steps, factor, power, end: See above.

  Raises:
    ValueError: The name is unknown, or the warm-up is not shorter than the run.
  """
  if warmup_steps >= total_steps:
    raise ValueError(f'warm-up (of {warmup_steps} steps) must be shorter than the run (of {total_steps})')
  rest = total_steps - warmup_steps
  match name:
    case 'constant':
      course = optax.constant_schedule(peak)
    case 'step':
      after = collections.Counter(max(boundary - warmup_steps, 0) for boundary in boundaries)
      course = optax.piecewise_constant_schedule(peak, {step: factor**n for step, n in after.items()})
    case 'cosine':
      course = optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0)
    case 'polynomial':
      course = optax.polynomial_schedule(peak, end, power, rest)
    case _:
      raise ValueError(f'unknown schedule {name!r}; choose from constant, step, cosine, polynomial')
  if not warmup_steps:
    return course
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), course], [warmup_steps])


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  spec: Spec | None = None,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Returns stochastic gradient descent: v = momentum * v + (g + weight_decay * w), w = w - rate * v.

  The gradient g is first clipped to a global norm of `clip_norm`, if given. Only kernels decay; biases
  and norms' scales do not, unless the spec says so.

  Args:
    learning_rate: A number, or a schedule by step.
    spec: The network, whose layers may multiply rate and decay (`Multipliers`); without one, only kernels
      decay and all rates are equal.
    momentum, nesterov, weight_decay, clip_norm: See above.
  """
  config = OptimizerConfig(
    momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, clip_norm=clip_norm
  )
  return optimizer(config, learning_rate, spec)


def optimizer(
  settings: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, spec: Spec | None = None
) -> optax.GradientTransformation:
  """Returns the optimizer `settings.name`, with clipping, weight decay and the spec's multipliers.

  Args:
    settings: The optimizer's settings; those of its learning rate are not read.
    learning_rate: A number, or a schedule by step.
    spec: See `sgd`.
  """
  layers = dict(spec.named_layers()) if spec else {}

  def multiplier(kind: str, path: tuple[Any, ...]) -> float:
    layer, parameter = path[0].key, path[-1].key
    own = getattr(layers.get(layer), 'multipliers', None)
    role = 'kernel' if parameter == 'kernel' or (own and parameter == 'scale') else 'bias'
    return getattr(own or Multipliers(), f'{role}_{kind}')

  def add_decay(path: tuple[Any, ...], gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    factor = multiplier('decay', path)
    return gradient + settings.weight_decay * factor * parameter if factor else gradient

  def scale_rate(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
    factor = multiplier('rate', path)
    return update if factor == 1 else update * factor

  by_path = jax.tree_util.tree_map_with_path
  clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
  decay = optax.identity()
  if settings.weight_decay:
    decay = optax.stateless(functools.partial(by_path, add_decay))
  chain = OPTIMIZERS[settings.name](settings, learning_rate, decay)
  return optax.chain(clip, *chain, optax.stateless(lambda updates, _: by_path(scale_rate, updates)))


def freeze(tx: optax.GradientTransformation, layers: Collection[str]) -> optax.GradientTransformation:
  """Returns the optimizer that leaves the parameters of some layers unchanged, and keeps no state for them.

  Gradient norms, for clipping, are those of the other layers alone.
  """
  if not layers:
    return tx
  return optax.partition(
    {'trained': tx, 'frozen': optax.set_to_zero()},
    lambda params: {name: 'frozen' if name in layers else 'trained' for name in params},
  )
