"""One training step and one evaluation step, pure: wrap them in `jit`, `pmap` or `shard_map`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from alexnet_flax.losses import cross_entropy
from alexnet_flax.metrics import Metrics, measure

Batch = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]
Preprocess = Callable[[Batch, jax.Array | None], Batch]


@struct.dataclass
class TrainState:
  """The state of training.

  Attributes:
    step: int32 [], the number of updates made.
    params, batch_stats: The model's collections (`batch_stats` is empty without BatchNorm).
    opt_state: The optimizer's state.
    ema: The exponential moving averages {'params', 'batch_stats'}, which `eval_step` then evaluates, or None.
    apply_fn, tx, ema_decay: Static: the model's `apply`, the optimizer, the averages' decay.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any
  apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
  tx: optax.GradientTransformation = struct.field(pytree_node=False)
  ema_decay: float | None = struct.field(pytree_node=False, default=None)


def create_train_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  key: jax.Array,
  image_shape: tuple[int, int, int],
  ema_decay: float | None = None,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: An `AlexNet`, or any module with its call signature.
    tx: The optimizer.
    key: The key that draws the initial parameters.
    image_shape: (H, W, 3), which determines the size of the first fully connected layer.
    ema_decay: The decay of exponential moving averages of parameters and statistics; None for none.

  Raises:
    ValueError: `ema_decay` is not between 0 and 1, or the image is too small for the network.
  """
  if ema_decay is not None and not 0 <= ema_decay < 1:
    raise ValueError(f'ema_decay (={ema_decay}) must be at least 0 and less than 1')
  # Jitted, the forward pass is not computed, nor compiled operation by operation, which took 240 MB.
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(key, jnp.zeros((1, *image_shape)))
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  ema = None
  if ema_decay is not None:  # a copy: donated buffers must not be shared between two leaves of the state
    ema = jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=tx.init(params),
    ema=ema,
    apply_fn=model.apply,
    tx=tx,
    ema_decay=ema_decay,
  )


def train_step(
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  loss: Loss = cross_entropy,
  preprocess: Preprocess | None = None,
  accumulate_steps: int = 1,
  axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
  """Updates the parameters once.

  The gradient is that of the weighted mean of the losses over the whole batch: sums over examples,
  micro-batches and devices, divided by the summed weight.

  With `accumulate_steps` = k the batch is processed in k parts of B / k examples (part i holds the examples
  i, i + k, ...), for 1/k of the memory; it remains one update and counts as one step. Each part is normalised
  by its own moments, so BatchNorm sees batches of B / k, and its running statistics advance k times a step.

  Args:
    state: The state from `create_train_state` or the step before. Donate it.
    batch: 'image' [B, H, W, 3], 'label' int32 [B], 'weight' float32 [B] (1, or 0 for padding; BatchNorm's
      moments count padding too), all 1 if it is left out.
    key: The run's key, the same at every step: the step's number is folded in.
    loss: A function of logits [B, C] and labels [B] that returns float [B].
    preprocess: A function of a batch and a key that returns a batch, on the device: uint8 to normalised
      floats, augmentation.
    accumulate_steps: The number of micro-batches; must divide B.
    axis_name: The mapped axis, under `pmap` or `shard_map`. Give it to the model as well.

  Returns:
    The next state, and the metrics of the whole batch.

  Raises:
    ValueError: `accumulate_steps` does not divide the batch, or the loss does not return float [B].
  """
  key, batch = jax.random.fold_in(key, state.step), _weighted(batch)
  params, total = state.params, jnp.sum(batch['weight'])
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    # Inside shard_map the derivative by a replicated value is summed over the axis already;
    # we sum it ourselves, the same way under pmap.
    params = jax.lax.pcast(params, axis_name, to='varying')
    total = jax.lax.psum(total, axis_name)
  total = jnp.where(total > 0, total, 1.0)

  def loss_sum(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> Any:
    preprocess_key, dropout_key = jax.random.split(key)
    if preprocess is not None:
      batch = preprocess(batch, preprocess_key)
    variables, rngs = {'params': params, 'batch_stats': batch_stats}, {'dropout': dropout_key}
    logits, mutated = state.apply_fn(
      variables, batch['image'], train=True, rngs=rngs, mutable=['batch_stats']
    )
    losses = loss(logits, batch['label'])
    metrics = measure(logits, batch['label'], losses, batch['weight'])
    return metrics.sums['loss'] / total, (metrics, mutated.get('batch_stats', {}))

  gradient = jax.grad(loss_sum, has_aux=True)

  def accumulate(carry: Any, part: tuple[Batch, jax.Array]) -> Any:
    sums, batch_stats = carry
    gradients, (metrics, batch_stats) = gradient(params, batch_stats, *part)
    return (jax.tree.map(jnp.add, sums, (gradients, metrics)), batch_stats), None

  if accumulate_steps == 1:
    gradients, (metrics, batch_stats) = gradient(params, state.batch_stats, batch, key)
  else:
    parts = micro_batches(batch, key, accumulate_steps)
    first, rest = (jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts))
    gradients, (metrics, batch_stats) = gradient(params, state.batch_stats, *first)
    carry, _ = jax.lax.scan(accumulate, ((gradients, metrics), batch_stats), rest)
    (gradients, metrics), batch_stats = carry

  if axis_name is not None:
    gradients, metrics = jax.lax.psum((gradients, metrics), axis_name)
    batch_stats = jax.lax.pmean(batch_stats, axis_name)  # equal on all devices already

  updates, opt_state = state.tx.update(_in_turn(gradients), state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if state.ema_decay is not None:
    # Lower at first, so that the initial weights are forgotten, as `tf.train.ExponentialMovingAverage` does
    # with `num_updates`.
    decay = jnp.minimum(state.ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update({'params': params, 'batch_stats': batch_stats}, ema, 1 - decay)
  state = dataclasses.replace(
    state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
  )
  return state, metrics


def _in_turn(gradients: Any) -> Any:
  """Lets the gradient of each kernel wait for that of the bias one layer before, on one CPU.

  The latter is computed after the kernel was read for the last time. XLA's CPU compiler would otherwise not
  know that the kernel may then be updated in place, and would copy all parameters before the step. It drops
  `lax.optimization_barrier` before it decides, so a zero is added that it cannot foresee.
  """
  if jax.device_count() > 1 or not isinstance(gradients, dict):
    return gradients
  layers = {name: layer for name, layer in gradients.items() if isinstance(layer, dict)}
  order = [name for name, layer in layers.items() if {'kernel', 'bias'} <= layer.keys()]
  order.sort(key=lambda name: int('0' + ''.join(filter(str.isdigit, name))))

  def wait(gradients: Any) -> Any:
    waiting = dict(gradients)
    for before, name in itertools.pairwise(order):
      zero = jnp.minimum(jnp.abs(gradients[before]['bias'].ravel()[0]), 0)
      kernel = waiting[name]['kernel']
      waiting[name] = waiting[name] | {'kernel': kernel + zero.astype(kernel.dtype)}
    return waiting

  return jax.lax.platform_dependent(gradients, cpu=wait, default=lambda gradients: gradients)


def eval_step(
  state: TrainState,
  batch: Batch,
  *,
  loss: Loss = cross_entropy,
  preprocess: Preprocess | None = None,
  axis_name: str | None = None,
) -> Metrics:
  """Measures one batch; arguments as for `train_step`, with None as the key for `preprocess`.

  'image' may be [B, V, H, W, 3], V views of each image: the prediction is then the mean of the softmax over
  them (Krizhevsky et al. 2012, section 4.1).
  """
  batch = _weighted(batch)
  if preprocess is not None:
    batch = preprocess(batch, None)
  images = batch['image']
  variables = state.ema or {'params': state.params, 'batch_stats': state.batch_stats}
  if images.ndim == 5:
    logits = state.apply_fn(variables, images.reshape(-1, *images.shape[2:]), train=False)
    each = jax.nn.log_softmax(logits.reshape(*images.shape[:2], -1))
    logits = jax.nn.logsumexp(each, axis=1) - jnp.log(float(images.shape[1]))
  else:
    logits = state.apply_fn(variables, images, train=False)
  metrics = measure(logits, batch['label'], loss(logits, batch['label']), batch['weight'])
  return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)


def _weighted(batch: Batch) -> Batch:
  labels = batch['label'].reshape(batch['label'].shape[0], -1)[:, 0]
  return {'weight': jnp.ones_like(labels, jnp.float32), **batch}


def micro_batches(batch: Batch, key: jax.Array, accumulate_steps: int) -> tuple[Batch, jax.Array]:
  """Returns the k = `accumulate_steps` parts [k, B / k, ...] that `train_step` processes, and their keys [k].

  Each device's examples stay on that device. A single part has the step's own key.

  Raises:
    ValueError: k does not divide B.
  """
  size, k = batch['image'].shape[0], accumulate_steps
  if size % k:
    raise ValueError(f'the batch (of {size}) must be divisible by accumulate_steps (={k})')
  parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(size // k, k, *x.shape[1:]), 0, 1), batch)
  return parts, jax.random.split(key, k) if k > 1 else key[None]


NonfinitePolicy = Literal['stop', 'skip']
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
GuardedStep = Callable[..., tuple[TrainState, Metrics, jax.Array, jax.Array]]


def guarded(
  step: Step, policy: NonfinitePolicy, peak_rate: float | None = None, frozen: Collection[str] = ()
) -> GuardedStep:
  """Returns a training step that leaves the state unchanged where the loss or the update is not finite.

  An update is not finite when the norm of the new parameters and statistics is not: in float32 its squares
  overflow long before the values do, when all is lost already. With `peak_rate` it is judged by the norm of
  the gradient times that rate, which bounds it: parameters and optimizer state then need not be read twice.
  Compares and selects on the device, so that the host need not wait.

  Args:
    step: `train_step`, with its options.
    peak_rate: The greatest learning rate of the run, of an optimizer whose updates are bounded by rate and
      gradient; None for others.
    frozen: The layers whose parameters stay.
    policy: 'skip' counts the step as made, and its images as not seen. 'stop' does not count it, nor make any
      update after it: the state stays what it was before that step, for inspection.

  Returns:
    A function (state, batch, key, going, stops) -> (state, metrics, going, stop). `going`, bool [], is handed
    on from step to step: whether the state was updated, and with 'stop' whether all states have been so far.
    `stops`, bool [devices], says on which devices the end was requested; `stop`, bool [], whether on any, the
    same for all processes.
  """

  def guarded_step(
    state: TrainState, batch: Batch, key: jax.Array, going: jax.Array, stops: jax.Array
  ) -> tuple[TrainState, Metrics, jax.Array, jax.Array]:
    gradients: list[Any] = []

    def update(updates: Any, opt_state: Any, params: Any = None) -> Any:
      gradients.append({name: part for name, part in updates.items() if name not in frozen})
      return state.tx.update(updates, opt_state, params)

    watched = dataclasses.replace(state, tx=optax.GradientTransformation(state.tx.init, update))
    new, metrics = step(watched, batch, key)
    new = dataclasses.replace(new, tx=state.tx)
    judged: Any = new.params
    if peak_rate is not None:
      judged = jax.tree.map(lambda x: x * max(peak_rate, 1.0), gradients[0])
    with jax.named_scope('guard'):
      norm = optax.tree.norm((judged, new.batch_stats))
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    if policy == 'stop':
      finite &= going
    kept: Any = jax.tree.map(lambda updated, old: jnp.where(finite, updated, old), new, state)
    if policy == 'skip':
      # The schedule and the dropout go on: all that counts steps counts this one too.
      def count(updated: jax.Array, old: jax.Array) -> jax.Array:
        return updated if jnp.issubdtype(updated.dtype, jnp.integer) else old

      kept = kept.replace(step=new.step, opt_state=jax.tree.map(count, new.opt_state, kept.opt_state))
      metrics = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), metrics)
    return kept, metrics, finite, jnp.any(stops)

  return guarded_step
