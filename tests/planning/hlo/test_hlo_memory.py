from moe_jax.planning.hlo import hlo_memory

HELD = """HloModule test, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %wide = f32[64,128]{1,0:T(8,128)} broadcast(%x.1), metadata={op_name="in/the/loop"}
  %near = f32[64,128]{1,0:T(8,128)S(1)} negate(%wide)
  %next = f32[8,128]{1,0:T(8,128)} slice(%near), slice={[0:8], [0:128]}
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %next)
}

%condition (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %go = pred[]{:T(512)} constant(false)
}

ENTRY %main (x: f32[8,100]) -> f32[8,128] {
  %x = f32[8,100]{1,0:T(8,128)} parameter(0)
  %first = f32[16,100]{1,0:T(8,128)} broadcast(%x), metadata={op_name="dead/before/the/loop"}
  %start = f32[8,128]{1,0:T(8,128)} slice(%first), metadata={op_name="carried"}
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %start)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %end = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %y = f32[8,128]{1,0:T(8,128)} add(%end, %end)
}
"""


def test_what_is_alive_when_most_is():
  """In the loop: its carry and the wide array, not what is on the chip or already read."""
  found = [(buffer.op_name, buffer.bytes) for buffer in hlo_memory.peak(HELD)]
  assert found == [('in/the/loop', 4 * 64 * 128), ('carried', 4 * 8 * 128)]


def test_padding_of_tiles_counts():
  shapes = HELD.replace('f32[64,128]', 'f32[1,128]').replace('f32[16,100]', 'f32[16,1]')
  found = [(buffer.op_name, buffer.bytes) for buffer in hlo_memory.peak(shapes)]
  # 16 rows of one number fill tiles of 8 x 128, as much as two rows' worth of them.
  assert found == [('dead/before/the/loop', 4 * 16 * 128), ('carried', 4 * 8 * 128)]


IN_PLACE = """HloModule test, is_scheduled=true

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %wide = f32[64,128]{1,0:T(8,128)} broadcast(%x), metadata={op_name="wide"}
  %new = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%wide, %x, %zero), metadata={op_name="new"}
  ROOT %y = f32[8,128]{1,0:T(8,128)} slice(LAST), slice={[0:8], [0:128]}
}
"""


def test_an_update_is_in_place_where_nobody_reads_the_old_array_later():
  names = [buffer.op_name for buffer in hlo_memory.peak(IN_PLACE.replace('LAST', '%new'))]
  assert names == ['wide']
  later = IN_PLACE.replace('LAST', '%new, %wide')
  assert {buffer.op_name for buffer in hlo_memory.peak(later)} == {'wide', 'new'}
