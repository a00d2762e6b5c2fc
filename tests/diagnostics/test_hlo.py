"""What a program computes, moves and sends, counted from its text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_flax.diagnostics import hlo

# Shapes small enough to count by hand. A while loop of three rounds; a copy into memory on the chip, S(1).
WRITTEN = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p.0: f32[8], p.1: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %m = f32[8]{0} multiply(%p.0, %p.1)
  ROOT %a = f32[8]{0} add(%m, %p.1), metadata={op_name="jit(step)/hidden"}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %y = f32[8]{0} fusion(%x, %x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(AlexNet)/conv1/mul"}
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, %y)
}

%sum (l: f32[], r.1: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r.1 = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r.1)
}

ENTRY %main (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0:T(8)} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[8]{0}) tuple(%zero, %arg)
  %loop = (s32[], f32[8]{0}) while(%first), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %out = f32[8]{0} get-tuple-element(%loop), index=1
  %copy-start = (f32[8]{0:T(8)S(1)}, f32[8]{0:T(8)}, u32[]{:S(2)}) copy-start(%out)
  %near = f32[8]{0:T(8)S(1)} copy-done(%copy-start)
  %call = (bf16[8]{0}, u8[0]{0}) custom-call(%near, %out), custom_call_target="__cudnn$convForward"
  %few = f32[8]{0} all-reduce(%near), replica_groups={{0,1}}, to_apply=%sum
  ROOT %all = f32[8]{0} all-reduce(%out), replica_groups={{0,1}}, to_apply=%sum
}
"""


def test_bytes_of_a_written_program():
  moved = hlo.moved(hlo.parse(WRITTEN))
  kinds = [(one.opcode, one.bytes) for one in moved]
  # 32 bytes an array: 3 rounds of two reads and a write; one read into the chip; a read from the main memory
  # and 16 bytes written; written, from the chip; read and written.
  assert kinds[:3] == [('fusion', 3 * 96), ('copy', 32), ('__cudnn$convForward', 48)]
  assert kinds[3:] == [('all-reduce', 32), ('all-reduce', 64)]
  assert [one.is_collective for one in moved] == [False, False, False, True, True]
  assert moved[0].source == 'jit(f)/jvp(AlexNet)/conv1/mul'
  assert hlo.collectives(hlo.parse(WRITTEN)) == {'all-reduce': (2, 64)}


@pytest.mark.parametrize(
  ('collective', 'sent'),
  [
    ('all-reduce(%arg), to_apply=%sum', 2 * 7 / 8 * 32),  # 32 bytes, eight devices
    ('all-reduce(%arg), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum', 32),
    ('all-reduce(%arg), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%sum', 2 * 3 / 4 * 32),
    ('all-gather(%arg), replica_groups=[2,4]<=[8], dimensions={0}', 3 * 32),
    ('reduce-scatter(%arg), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum', 3 / 4 * 32),
    ('collective-permute(%arg), source_target_pairs={{0,1},{1,0}}', 32),
  ],
)
def test_bytes_sent_around_the_ring_of_a_group(collective, sent):
  text = f"""
ENTRY %main (arg: f32[8]) -> f32[8] {{
  %arg = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} {collective}
}}
"""
  assert hlo.bytes_sent(hlo.parse(text), 8) == pytest.approx(sent)


@pytest.mark.parametrize(
  ('line', 'bytes_moved'),
  [
    ('(f32[8]{0}, f32[8]{0}) all-reduce-start(%arg), to_apply=%sum', 64),
    ('((f32[8]{0}), f32[2]{0:S(1)}, s32[]) slice-start(%arg), slice={[0:2]}', 8),
    ('f32[8]{0} dynamic-update-slice(%arg, %two, %zero)', 16),
    ('f32[2,4]{1,0} bitcast(%arg)', 0),
    ('f32[8]{0} copy(%arg)', 64),
  ],
)
def test_bytes_of_one_instruction(line, bytes_moved):
  text = f"""
ENTRY %main (arg: f32[8], two: f32[2], zero: s32[]) -> f32[8] {{
  %arg = f32[8]{{0}} parameter(0)
  %two = f32[2]{{0}} parameter(1)
  %zero = s32[] parameter(2)
  ROOT %x = {line}
}}
"""
  assert sum(one.bytes for one in hlo.moved(hlo.parse(text))) == bytes_moved


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('strides', [1, 2])
def test_arithmetic_of_a_convolution_and_its_derivatives(strides, groups):
  """Each product of a pixel and a weight once, and none with padding: counted by a convolution of ones."""

  def convolution(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))
  products = float(jnp.sum(convolution(x, kernel)))

  def both(x, kernel):
    y, pull = jax.vjp(convolution, x, kernel)
    return pull(y)

  for function, times in ((convolution, 1), (both, 3)):
    text = jax.jit(function).lower(x, kernel).as_text('hlo')
    assert hlo.arithmetic(hlo.parse(text)) == 2 * times * products


def test_arithmetic_of_products_in_loops():
  def function(x, y):
    return jax.lax.fori_loop(0, 5, lambda _, x: x @ y, x)

  shape = jax.ShapeDtypeStruct((4, 4), np.float32)
  compiled = jax.jit(function).lower(shape, shape).compile()
  assert hlo.arithmetic(hlo.parse(compiled.as_text())) == 5 * 2 * 4**3


def test_types():
  text = """
ENTRY %m (a: f8e4m3fn[4]) -> s4[4] {
  %a = f8e4m3fn[4]{0} parameter(0)
  ROOT %b = s4[4]{0} convert(%a)
}
"""
  assert [one.bytes for one in hlo.moved(hlo.parse(text))] == [4 + 2]
