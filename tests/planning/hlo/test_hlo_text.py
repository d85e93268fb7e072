from moe_jax.planning.hlo import collectives, hlo_text
from tests.planning.hlo import programs


def test_a_loop_is_multiplied_out_from_its_condition():
  text = 'HloModule test, num_partitions=8\n' + programs.LOOP
  (found,) = collectives.collectives(text, programs.MESH)
  # 1, 3 and 5 are below 7.
  assert (found.count, found.bytes, found.total) == (3, 128.0, 384.0)
  assert (
    collectives.summary(text, programs.MESH).split()
    == 'all-reduce expert in loop x3 1 ops 384 bytes'.split()
  )


def test_a_recorded_trip_count_comes_first():
  recorded = 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
  text = 'HloModule test, num_partitions=8\n' + programs.LOOP.replace('body=%body', recorded)
  assert collectives.collectives(text, programs.MESH)[0].count == 11


def test_a_loop_that_depends_on_data_is_counted_once_and_says_so():
  text = programs.LOOP.replace(
    '%start = s32[]{:T(128)} copy(%first)', '%start = s32[] custom-call(%x)'
  )
  text = 'HloModule test, num_partitions=8\n' + text
  (found,) = collectives.collectives(text, programs.MESH)
  assert (found.count, found.is_known) == (1, False)
  assert 'in loop x?' in collectives.summary(text, programs.MESH)


def test_shapes():
  (shape,) = hlo_text.shapes_of('bf16[6,1024]{1,0:T(8,128)(2,1)S(1)}')
  assert (shape.dims, shape.bytes, shape.on_chip) == ((6, 1024), 12288, True)
  assert shape.padded_bytes == 2 * 8 * 1024
  for text, size in (('f32[5]{0:T(8,128)}', 512), ('f32[3,130]{1,0:T(8,128)}', 8192)):
    assert hlo_text.shapes_of(text)[0].padded_bytes == size
  sizes = [s.bytes for s in hlo_text.shapes_of('(f32[2,3]{1,0}, /*index=5*/f8e4m3fn[5], pred[])')]
  assert sizes == [24, 5, 1]
  assert [s.bytes for s in hlo_text.shapes_of('(s4[3], token[])')] == [2, 0]
