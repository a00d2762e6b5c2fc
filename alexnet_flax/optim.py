"""SGD with momentum, its schedules, and the per-layer multipliers of the specs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from alexnet_flax.models.spec import Multipliers, Spec

SCHEDULES = ('constant', 'step', 'cosine', 'polynomial')


def learning_rate_schedule(
  name: str,
  peak: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  boundaries: Sequence[int] = (),
  factor: float = 0.1,
  power: float = 1.0,
  end: float = 0.0,
) -> optax.Schedule:
  """Learning rate by step: a linear rise from 0 over `warmup_steps`, then a named course.

  Args:
    name: 'constant'; 'step' (times `factor` at each of `boundaries`); 'cosine' or 'polynomial'
      (of `power`; 1 is linear), which fall from `peak` to `end` at `total_steps`.
    peak: the rate at the end of the warm-up.
    total_steps: the run's length, warm-up included.
    warmup_steps: length of the rise.
    boundaries: steps, counted from the run's start.
    factor, power, end: as above.

  Raises:
    ValueError: an unknown name, or a warm-up that is not shorter than the run.
  """
  if warmup_steps >= total_steps:
    raise ValueError(f'warm-up (of {warmup_steps} steps) must be shorter than the run (of {total_steps})')
  rest = total_steps - warmup_steps
  match name:
    case 'constant':
      course = optax.constant_schedule(peak)
    case 'step':
      scales: dict[int, float] = {}
      for boundary in boundaries:
        after = max(boundary - warmup_steps, 0)
        scales[after] = scales.get(after, 1.0) * factor
      course = optax.piecewise_constant_schedule(peak, scales)
    case 'cosine':
      course = optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0)
    case 'polynomial':
      course = optax.polynomial_schedule(peak, end, power, rest)
    case _:
      raise ValueError(f'unknown schedule {name!r}; choose from {", ".join(SCHEDULES)}')
  if not warmup_steps:
    return course
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), course], [warmup_steps])


def sgd(
  learning_rate: float | optax.Schedule,
  *,
  spec: Spec | None = None,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Stochastic gradient descent, v = momentum * v + (g + weight_decay * w), w = w - rate * v.

  The gradient g is first clipped to a global norm of `clip_norm`, if that is given. Only kernels
  decay; a bias or a norm's scale does not, unless the spec says so.

  Args:
    learning_rate: a number, or a schedule by step.
    spec: layers may multiply rate and decay (`Multipliers`); without a spec all are 1 for kernels.
    momentum, nesterov, weight_decay, clip_norm: as above.
  """

  def multiplier(kind: str, default: Callable[[str], float]) -> Callable[[Any], Any]:
    layers = {
      name: layer.multipliers
      for name, layer in (spec.named_layers() if spec else ())
      if hasattr(layer, 'multipliers')
    }

    def by_leaf(path: tuple[Any, ...], _: Any) -> float:
      layer, parameter = path[0].key, path[-1].key
      if layer in layers and parameter in ('kernel', 'scale', 'bias'):
        role = 'bias' if parameter == 'bias' else 'kernel'
        return getattr(layers[layer], f'{role}_{kind}')
      return default(parameter)

    return lambda params: jax.tree_util.tree_map_with_path(by_leaf, params)

  decay = multiplier('decay', lambda name: Multipliers.kernel_decay if name == 'kernel' else 0.0)
  rate = multiplier('rate', lambda name: 1.0)

  def add_decay(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, w, m: g + weight_decay * m * w if m else g, updates, params, decay(params))

  def scale_rate(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, m: g if m == 1 else g * m, updates, rate(params))

  return optax.chain(
    optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
    optax.stateless(add_decay) if weight_decay else optax.identity(),
    optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    optax.stateless(scale_rate),
  )
