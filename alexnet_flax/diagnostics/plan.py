"""Plans a run for devices that need not be there: compiles its own training step, and reads the program."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from alexnet_flax.config import Config, with_values
from alexnet_flax.data import loader
from alexnet_flax.data.source import Source
from alexnet_flax.data.tfds_source import open_dataset
from alexnet_flax.diagnostics import hlo
from alexnet_flax.diagnostics.accelerators import (
  Accelerator,
  Devices,
  compile_only_devices,
  require_compiler,
)
from alexnet_flax.errors import UsageError
from alexnet_flax.models.variants import VARIANTS
from alexnet_flax.training.experiment import Experiment, assemble, lower_train_step

# JAX takes so much of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_SHARE_OF_GPU_MEMORY = 0.75
# Of our input on one core, photographs of ImageNet as they are (docs/performance.md).
MEASURED_INPUT = 900.0
_IMAGENET = 1_281_167
_MEASURED_SECONDS = 5.0
_MOST_TRIES = 5  # of batches, to find the greatest that fits


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the compiled step of a run says. Bytes and operations are those of one device in one step.

  Attributes:
    device: The devices, 'v5e:4x4'.
    devices: Their number.
    variant, dtype: The network, and the type of its arithmetic.
    batch_size: Images a step, all devices together.
    operations: Arithmetic of convolutions and matrix products.
    bytes_moved: To and from the main memory, counted from the program's instructions (`hlo`).
    bytes_of_compiler: The same by the compiler's own cost analysis; None where it has none.
    bytes_by_part: `bytes_moved` by part of the step, 'conv1 forward', greatest first.
    collectives: By kind, their number and the bytes that a device contributes to them.
    bytes_kept, bytes_greatest, bytes_available: Memory of the state, of everything at the worst moment, and
      that programs can have.
    greatest_batch: The greatest batch found to fit, to some 3 %; None if this one fits, or none does.
    seconds: What each limit alone would need: 'arithmetic', 'memory', 'collectives'.
    share: The share of the roofline's speed that is expected.
    input_per_thread: Images per second of one thread of our input.
    input_is_measured: Whether they were measured on this machine, with this data.
    total_steps: Steps of the run.
  """

  device: str
  devices: int
  variant: str
  dtype: str
  batch_size: int
  operations: float
  bytes_moved: int
  bytes_of_compiler: float | None
  bytes_by_part: dict[str, int]
  collectives: dict[str, tuple[int, int]]
  bytes_kept: int
  bytes_greatest: int
  bytes_available: int
  greatest_batch: int | None
  seconds: dict[str, float]
  share: float
  input_per_thread: float
  input_is_measured: bool
  total_steps: int

  @property
  def fits(self) -> bool:
    """Whether the batch fits into the devices' memory."""
    return self.bytes_greatest <= self.bytes_available

  @property
  def bound(self) -> str:
    """What bounds the step: the limit that needs most time."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def images_per_second(self) -> float:
    """Of all devices together, at the roofline."""
    return self.batch_size / self.seconds[self.bound]

  @property
  def hours(self) -> float:
    """Of the whole run, at the stated share of the roofline."""
    return self.total_steps * self.seconds[self.bound] / self.share / 3600

  @property
  def threads(self) -> int:
    """How many threads of our input feed all devices, at the stated share of the roofline."""
    return math.ceil(self.share * self.images_per_second / self.input_per_thread)

  def to_dict(self) -> dict[str, Any]:
    """Returns fields and conclusions, for JSON."""
    names = ('fits', 'bound', 'images_per_second', 'hours', 'threads')
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def plan(
  config: Config,
  devices: Devices,
  *,
  share: float = 0.5,
  measure_input: bool = False,
  num_images: int | None = None,
  say: Callable[[str], None] = print,
) -> Plan:
  """Compiles the training step of a run for devices, and returns what it would need there.

  Args:
    config: The run's configuration.
    devices: What to compile for.
    share: See `Plan`.
    measure_input: Whether to measure this machine's input with the run's data.
    num_images: The number of training images; by default that of the prepared data set, or of ImageNet.
    say: Called with a line about what takes its time.

  Raises:
    UsageError: The compiler is not installed, the batch does not divide, or the data are not there.
  """
  require_compiler(devices)
  source = _source(config, num_images)
  targets = compile_only_devices(devices)
  experiment = assemble(config, source, source, targets)
  accelerator, batch = devices.accelerator, experiment.config.data.batch_size
  say(f'compiling the step for {batch:,} images on {devices}; this takes a minute or more')
  compiled, needed = _compile(experiment, accelerator)
  limit, greatest = available(accelerator), None
  if needed > limit:
    greatest = _greatest_batch(config, source, targets, accelerator, needed, say)
  if compiled is None:
    too_much = (needed - limit) / 1e9
    found = 'none does' if greatest is None else f'the greatest found to fit is {greatest:,}'
    raise UsageError(
      f'data.batch_size (={batch}) does not fit on {devices}: {too_much:,.1f} GB too much; {found}'
    )
  per_thread = _measure_input(experiment) if measure_input else MEASURED_INPUT
  return _read(experiment, devices, compiled, needed, greatest, share, per_thread, measure_input)


def available(accelerator: Accelerator) -> int:
  """Returns the bytes of a device's memory that a run can have by default."""
  return round(accelerator.memory * (_SHARE_OF_GPU_MEMORY if accelerator.kind == 'gpu' else 1))


def roofline(
  accelerator: Accelerator, dtype: str, operations: float, bytes_moved: float, bytes_sent: float
) -> dict[str, float]:
  """Returns the seconds that arithmetic, memory and collectives need, each alone and at its peak.

  What is sent goes as fast as all links of a device together allow.
  """
  return {
    'arithmetic': operations / accelerator.peak(dtype),
    'memory': bytes_moved / accelerator.bandwidth,
    'collectives': bytes_sent / accelerator.link,
  }


def part_of_step(moved: hlo.Moved, layers: Iterable[str]) -> str:
  """Returns which part of the training step an operation belongs to: 'conv1 backward', 'update', ..."""
  if moved.is_collective:
    return 'collectives'
  names, source = set(layers), moved.source
  layer = next((name for name in re.split(r'[/()]', source) if name in names), None)
  if layer is not None:
    return f'{layer} {"backward" if "transpose(" in source else "forward"}'
  if 'jvp(' in source:
    return 'images and loss'
  if '/guard/' in source:
    return 'guard'
  return 'update' if source.startswith('jit(guarded_step)') else 'copies'


def _compile(experiment: Experiment, accelerator: Accelerator) -> tuple[jax.stages.Compiled | None, int]:
  """Returns the compiled step, None if the compiler finds that it does not fit, and the bytes needed."""
  # There is no GPU on which algorithms could be tried.
  options: Any = {'xla_gpu_autotune_level': 0} if accelerator.kind == 'gpu' else None
  try:
    compiled = lower_train_step(experiment, _placed_state(experiment)).compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r'Used ([\d.]+)([KMG]) of', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or found is None:
      raise
    return None, round(float(found[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[found[2]])
  memory = compiled.memory_analysis()
  assert memory is not None
  parts = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return compiled, parts + memory.temp_size_in_bytes


def _placed_state(experiment: Experiment) -> Any:
  """Returns the state's shapes, with their places on the devices."""

  def placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(placed, experiment.state, experiment.steps.state)


def _state_bytes(experiment: Experiment) -> int:
  """Returns the bytes of one device's share of the state."""
  leaves = jax.tree.leaves(_placed_state(experiment))
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _greatest_batch(
  config: Config,
  source: Source,
  targets: list[Any],
  accelerator: Accelerator,
  needed: int,
  say: Callable[[str], None],
) -> int | None:
  """Returns the greatest batch that is found to fit, by few compilations; None if none does.

  Memory is nearly linear in the batch: the next one lies on the line from one that fits to one that does not.
  """
  unit, limit = len(targets) * config.optimizer.accumulate_steps, available(accelerator)
  # Batches in units, and the bytes that they need: an empty one has the state alone.
  low, low_bytes = 0, _state_bytes(assemble(config, source, source, targets))
  high, high_bytes = config.data.batch_size // unit, needed
  for _ in range(_MOST_TRIES):
    if low_bytes > limit or high - low <= max(high // 32, 1):
      break
    fitting = low + math.floor((high - low) * (limit - low_bytes) / (high_bytes - low_bytes))
    middle = min(max(fitting, low + 1), high - 1)
    say(f'{high * unit:,} images need {high_bytes / 1e9:,.1f} GB; trying {middle * unit:,}')
    batches = dict.fromkeys(('data.batch_size', 'data.eval_batch_size'), middle * unit)
    smaller = assemble(with_values(config, batches), source, source, targets)
    _, size = _compile(smaller, accelerator)
    if size <= limit:
      low, low_bytes = middle, size
    else:
      high, high_bytes = middle, size
  return low * unit or None


def _read(
  experiment: Experiment,
  devices: Devices,
  compiled: jax.stages.Compiled,
  needed: int,
  greatest: int | None,
  share: float,
  per_thread: float,
  is_measured: bool,
) -> Plan:
  """Reads the compiled program."""
  config, accelerator = experiment.config, devices.accelerator
  whole = lower_train_step(experiment, _placed_state(experiment)).as_text('hlo')
  operations = hlo.arithmetic(hlo.parse(whole)) / devices.count
  program = hlo.parse(compiled.as_text() or '')
  layers = [name for name, _ in experiment.spec.named_layers()]
  by_part: dict[str, int] = {}
  for one in hlo.moved(program):
    name = part_of_step(one, layers)
    by_part[name] = by_part.get(name, 0) + one.bytes
  moved = sum(by_part.values())
  costs: Any = compiled.cost_analysis()
  return Plan(
    device=str(devices),
    devices=devices.count,
    variant=config.model.variant,
    dtype=config.model.dtype,
    batch_size=config.data.batch_size,
    operations=operations,
    bytes_moved=moved,
    bytes_of_compiler=costs.get('bytes accessed') if costs else None,
    bytes_by_part=dict(sorted(by_part.items(), key=lambda item: -item[1])),
    collectives=hlo.collectives(program),
    bytes_kept=_state_bytes(experiment),
    bytes_greatest=needed,
    bytes_available=available(accelerator),
    greatest_batch=greatest,
    seconds=roofline(
      accelerator, config.model.dtype, operations, moved, hlo.bytes_sent(program, devices.count)
    ),
    share=share,
    input_per_thread=per_thread,
    input_is_measured=is_measured,
    total_steps=experiment.schedule.total_steps,
  )


def _source(config: Config, num_images: int | None) -> Source:
  """Returns the training split, or what a plan must know of one that is not prepared."""
  name, classes = config.data.dataset, config.model.num_classes or VARIANTS[config.model.variant].num_classes
  if num_images is None:
    try:
      return open_dataset(name, config.data.train_split, config.data.data_dir, verify=False)
    except UsageError as error:
      if not name.startswith('imagenet2012'):
        raise UsageError(f'{error}; or state --images') from None
      num_images = _IMAGENET

  def read(numbers: np.ndarray) -> Any:
    raise UsageError(f'{name} is not prepared')

  return Source(name, num_images, tuple(map(str, range(classes))), read, read, '')


def _measure_input(experiment: Experiment) -> float:
  """Returns the images per second of one thread of this machine with the run's data."""
  data, config = experiment.data, experiment.config
  batches = loader.train_batches(
    data.train,
    data.train_view,
    seed=config.seed,
    batch_size=config.data.batch_size,
    first_step=0,
    last_step=1 << 30,
    num_threads=1,
    bad=data.bad,
  )
  next(batches)
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < _MEASURED_SECONDS:
    count += len(next(batches)['label'])
  return count / (time.perf_counter() - start)
