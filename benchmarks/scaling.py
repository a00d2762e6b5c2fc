"""How the cost of a training step grows: with the batch, the width and the image size, and over devices.

  python benchmarks/scaling.py [--network batchnorm] [--rounds 5]

Seconds are medians, memory is what XLA's plan of the compiled step takes (arguments, results and
temporaries), both on this machine's processor; an exponent of 1 means that twice as much costs twice as much.
The network is a quarter as wide as its variant, but where the width varies. Devices are simulated: what
counts there is not time, but the arithmetic of a device, and how many bytes it gives to how many collectives.
The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import time

os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from alexnet_flax import VARIANTS, AlexNet, create_train_state, sgd, train_step
from alexnet_flax.diagnostics import hlo
from alexnet_flax.training import parallel

BATCH, WIDTH = 32, 1 / 4
SERIES = {
  'batch': (8, 16, 32, 64, 128, 256),
  'width': (1 / 8, 1 / 4, 1 / 2, 1),
  'size': (96, 128, 160, 192, 224),
}


def compiled_step(network: str, batch: int, width: float, size: int | None, devices: int = 1, model: int = 1):
  """Returns the compiled step and its first arguments, on the first of the simulated devices."""
  spec = VARIANTS[network]
  spec = spec.scaled(width, size or spec.image_size)
  mesh = parallel.make_mesh(jax.devices()[:devices], model)
  whole = parallel.dense_input(mesh) if model > 1 else None
  net, tx = AlexNet(spec, dense_input_sharding=whole), sgd(0.01, spec=spec)
  shape = (spec.image_size, spec.image_size, 3)
  init = lambda: create_train_state(net, tx, jax.random.key(0), shape)  # noqa: E731
  placed = parallel.state_sharding(jax.eval_shape(init), spec, mesh)
  split, replicated = (NamedSharding(mesh, axes) for axes in (PartitionSpec(parallel.AXES), PartitionSpec()))
  images = jax.random.normal(jax.random.key(1), (batch, *shape))
  data = jax.device_put({'image': images, 'label': jnp.arange(batch) % 1000}, split)
  arguments = jax.jit(init, out_shardings=placed)(), data, jax.device_put(jax.random.key(2), replicated)
  step = jax.jit(train_step, out_shardings=(placed, replicated), donate_argnums=0)
  return step.lower(*arguments).compile(), arguments


def seconds_and_bytes(rounds: int, network: str, **sizes) -> tuple[float, int]:
  """Returns the median time of a step, and the memory that it takes."""
  step, (state, data, key) = compiled_step(network, **sizes)
  seconds = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, data, key))
    seconds.append(time.perf_counter() - start)
  memory = step.memory_analysis()
  taken = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return statistics.median(seconds[1:]), taken + memory.temp_size_in_bytes


def exponent(sizes: list[float], costs: list[float]) -> float:
  """Returns the slope of log(cost) over log(size)."""
  return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--network', choices=VARIANTS, default='batchnorm')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--few', action='store_true', help='the first three sizes of each, and one round')
  arguments = parser.parse_args()
  rounds, last = (1, 3) if arguments.few else (arguments.rounds, None)
  found: dict[str, object] = {'network': arguments.network}
  for name, series in SERIES.items():
    costs = []
    for value in series[:last]:
      sizes = {'batch': BATCH, 'width': WIDTH, 'size': None} | {name: value}
      costs.append(seconds_and_bytes(rounds, arguments.network, **sizes))
      print(f'{name} {value:<6g} {1e3 * costs[-1][0]:9.1f} ms {costs[-1][1] / 2**20:8.0f} MiB', flush=True)
    slopes = {of: exponent(series[:last], [c[i] for c in costs]) for i, of in enumerate(('seconds', 'bytes'))}
    print(f'{name}: exponents {slopes}')
    found[name] = slopes
  for devices, model in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 8)):
    step, _ = compiled_step(arguments.network, BATCH, WIDTH, None, devices, model)
    flops, sent = step.cost_analysis()['flops'], hlo.collectives(hlo.parse(step.as_text()))
    print(f'devices {devices}, mesh.model {model}: {flops / 1e9:.1f} GFLOP a device; {sent}', flush=True)
    found[f'{devices} devices, model {model}'] = {'flops': flops, 'collectives': sent}
  print(json.dumps(found))


if __name__ == '__main__':
  main()
