"""A plan as lines of text."""

import math
from collections.abc import Iterator

from alexnet_flax.diagnostics.accelerators import parse_devices
from alexnet_flax.diagnostics.plan import Plan

_PARTS_SHOWN = 12


def lines(plan: Plan) -> Iterator[str]:
  """Yields what `alexnet-flax plan` prints."""
  accelerator = parse_devices(plan.device).accelerator
  each = f'; {plan.batch_size // plan.devices:,} a device' if plan.devices > 1 else ''
  yield f'{plan.variant}, {plan.dtype}, {plan.batch_size:,} images a step on {plan.device}{each}'
  yield 'compiled, not run; figures are of one device in one step'
  yield ''
  times = {name: f'{1e3 * seconds:8.3f} ms' for name, seconds in plan.seconds.items()}
  yield (
    f'arithmetic   {_amount(plan.operations, "FLOP"):16} {times["arithmetic"]}'
    f'  at {accelerator.peak(plan.dtype) / 1e12:,.0f} TFLOP/s: convolutions and matrix products'
  )
  yield (
    f'memory       {_amount(plan.bytes_moved, "B"):16} {times["memory"]}'
    f'  at {accelerator.bandwidth / 1e12:,.2f} TB/s: operands and results of each compiled kernel'
  )
  sent = sum(size for _, size in plan.collectives.values())
  yield (
    f'collectives  {_amount(sent, "B"):16} {times["collectives"]}'
    f'  at {accelerator.link / 1e9:,.0f} GB/s: {_collectives(plan)}'
  )
  if plan.bytes_of_compiler is not None:
    yield (
      f"             {_amount(plan.bytes_of_compiler, 'B')} accessed by the compiler's own analysis,"
      ' memory on the chip included'
    )
  else:
    yield '             this compiler has no cost analysis of its own'
  yield ''
  for part, size in list(plan.bytes_by_part.items())[:_PARTS_SHOWN]:
    yield f'  {_amount(size, "B")} {size / plan.bytes_moved:5.1%}  {part}'
  rest = list(plan.bytes_by_part.values())[_PARTS_SHOWN:]
  if rest:
    yield f'  {_amount(sum(rest), "B")} {sum(rest) / plan.bytes_moved:5.1%}  {len(rest)} others'
  yield ''
  kept, greatest = (size / 1e9 for size in (plan.bytes_kept, plan.bytes_greatest))
  yield f'memory kept {kept:,.2f} GB, greatest {greatest:,.2f} GB {_fit(plan)}'
  at_share = plan.share * plan.images_per_second
  yield (
    f'the roofline is {1e3 * plan.seconds[plan.bound]:,.3f} ms a step, bound by {plan.bound}:'
    f' {plan.images_per_second:,.0f} images/s; at {plan.share:.0%} of it {at_share:,.0f}'
  )
  source = 'measured here' if plan.input_is_measured else 'photographs as they are; --measure-input for yours'
  yield (
    f'{plan.threads:,} threads of our input feed that, at {plan.input_per_thread:,.0f} images/s each'
    f' ({source})'
  )
  takes = f'{plan.hours:,.2f} hours' if plan.hours >= 0.1 else f'{3600 * plan.hours:,.0f} seconds'
  yield f'{plan.total_steps:,} steps take {takes} at that speed, without evaluation'


def _amount(value: float, name: str) -> str:
  """Returns a number of operations or bytes with the prefix that suits it: '  3.908 GB'."""
  power = min(max(math.floor(math.log10(max(value, 1)) / 3), 0), 4)
  return f'{value / 1000**power:7.3f} {" kMGT"[power].strip()}{name}'


def _collectives(plan: Plan) -> str:
  parts = (f'{count} {kind}, {size / 1e6:,.1f} MB' for kind, (count, size) in plan.collectives.items())
  return '; '.join(parts) or 'none'


def _fit(plan: Plan) -> str:
  there = f'of {plan.bytes_available / 1e9:,.2f} that a program can have'
  if parse_devices(plan.device).accelerator.kind == 'gpu':
    there += ' (XLA_PYTHON_CLIENT_MEM_FRACTION=0.75)'
  if plan.fits:
    return f'{there}: the batch fits'
  more = (plan.bytes_greatest - plan.bytes_available) / 1e9
  most = (
    'none does' if plan.greatest_batch is None else f'the greatest found to fit is {plan.greatest_batch:,}'
  )
  return f'{there}: {more:,.2f} GB too much; {most}'
