import pathlib
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts

from moe_jax import errors
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.checkpoints import integrity
from moe_jax.config import schema

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')

META = {'config': {'train': {'seed': 3, 'ramp': (1, 2)}}, 'data': 'fingerprint'}


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  opt_state: Any


def make_state(step: int, dim: int = 16) -> State:
  key = jax.random.key(step)
  params = {
    'block': {'kernel': jax.random.normal(key, (dim, 24)), 'scale': jnp.ones(5, jnp.bfloat16) / 3},
    'bias': jnp.arange(dim, dtype=jnp.float32),
  }
  opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
  extra = {'mask': jnp.array([True, False, True]), 'key': jnp.array([7, 2**32 - 1], jnp.uint32)}
  return State(jnp.int32(step), {**params, **extra}, opt_state)


def abstract(state: State) -> State:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def checkpointer(path, keep_last=3, keep_every=0, save_every=10):
  return checkpointer_lib.Checkpointer(
    path, schema.CheckpointConfig(save_every, keep_last, keep_every)
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
  """Steps 10, 20 and 30, written once and copied by the tests that damage them."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with checkpointer(path) as ckpt:
    for step in (10, 20, 30):
      assert ckpt.save(step, make_state(step), META)
  return path


@pytest.fixture
def steps(saved, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'checkpoints'))


def chunks(step_dir: pathlib.Path) -> list[pathlib.Path]:
  """Files that hold array data, largest first."""
  files = [p for p in step_dir.glob('state/**/d/*') if p.is_file()]
  return sorted(files, key=lambda p: -p.stat().st_size)


def truncate_chunk(step_dir):
  path = chunks(step_dir)[0]
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(offset: int):
  def damage(step_dir):
    path = chunks(step_dir)[0]
    data = bytearray(path.read_bytes())
    for i in (offset, offset + 1):
      data[i] ^= 0x55
    path.write_bytes(data)

  return damage


def empty_step(step_dir):
  shutil.rmtree(step_dir)
  step_dir.mkdir()


def tamper_with_meta(step_dir):
  path = step_dir / 'meta/metadata'
  text = path.read_text()
  assert '"seed": 3' in text
  path.write_text(text.replace('"seed": 3', '"seed": 4'))


DAMAGES = {
  'truncated chunk': truncate_chunk,
  'missing chunk': lambda d: chunks(d)[0].unlink(),
  'no chunk at all': lambda d: [p.unlink() for p in chunks(d)],
  'flip that breaks the decoder': flip(5),
  'flip that restores silently': flip(400),
  'missing step metadata': lambda d: (d / '_CHECKPOINT_METADATA').unlink(),
  'missing state metadata': lambda d: (d / 'state/_METADATA').unlink(),
  'missing meta': lambda d: shutil.rmtree(d / 'meta'),
  'altered meta': tamper_with_meta,
  'torn meta': lambda d: (d / 'meta/metadata').write_text('{"step": 30, '),
  'missing state': lambda d: shutil.rmtree(d / 'state'),
  'missing manifest': lambda d: (d / 'state/manifest.ocdbt').unlink(),
  'empty step directory': empty_step,
  'another step under this name': lambda d: (
    shutil.rmtree(d),
    shutil.copytree(d.parent / '10', d),
  ),
}


def test_restores_the_newest_step_with_its_meta(saved, capfd):
  with checkpointer(saved) as ckpt:
    restored = ckpt.restore(abstract(make_state(0)))
  assert restored.step == 30
  assert_same(restored.state, make_state(30))
  assert isinstance(restored.state.opt_state[1][0], optax.ScaleByAdamState)
  assert restored.meta == {
    'config': {'train': {'seed': 3, 'ramp': [1, 2]}},
    'data': 'fingerprint',
    'step': 30,
  }
  assert 'WARNING' not in capfd.readouterr().err


def test_no_steps_is_none_and_a_reader_creates_nothing(tmp_path):
  with checkpointer_lib.Checkpointer(tmp_path / 'none', None) as ckpt:
    assert ckpt.restore(abstract(make_state(0))) is None
    assert ckpt.read_meta() is None
    with pytest.raises(ValueError, match='only reads'):
      ckpt.save(1, make_state(1), {})
    with pytest.raises(errors.InputError, match='step=5 is not among .* there are none'):
      ckpt.restore(abstract(make_state(0)), step=5)
  assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES.keys())
def test_falls_back_from_a_damaged_step(steps, damage, caplog, capfd):
  damage(steps / '30')
  before = sorted(p.name for p in steps.iterdir())
  with checkpointer_lib.Checkpointer(steps, None, read_only=True) as reader:
    assert reader.restore(abstract(make_state(0))).step == 20
  assert sorted(p.name for p in steps.iterdir()) == before, 'a reader must not rename'
  assert 'step 30' in caplog.text and 'Using step 20' in caplog.text
  with checkpointer(steps) as ckpt:
    restored = ckpt.restore(abstract(make_state(0)))
    assert_same(restored.state, make_state(20))
    assert restored.step == 20
    # The resumed run reaches step 30 again and saves it under its number.
    assert ckpt.save(30, make_state(30), META)
  assert sorted(p.name for p in steps.iterdir()) == ['10', '20', '30', '30.damaged-1']
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    assert_same(reader.restore(abstract(make_state(0))).state, make_state(30))
  assert 'Traceback' not in capfd.readouterr().err


def test_flipped_bytes_anywhere_are_noticed(steps, caplog):
  # Compressed chunks: some flips break the decoder, others give wrong numbers, others hit unused
  # bytes of the container. Whatever comes back as step 30 must equal what was saved.
  path = chunks(steps / '30')[0]
  original = path.read_bytes()
  fell_back = 0
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    for offset in range(5, len(original) - 1, len(original) // 12):
      data = bytearray(original)
      data[offset] ^= 0x55
      data[offset + 1] ^= 0xAA
      path.write_bytes(data)
      restored = reader.restore(abstract(make_state(0)))
      fell_back += restored.step == 20
      assert_same(restored.state, make_state(restored.step))
  assert fell_back >= 8
  assert 'cannot be read' in caplog.text and 'differ from their checksums' in caplog.text


def test_leftover_of_a_killed_save_is_ignored_and_does_not_block_its_step(steps, capfd):
  (steps / '30').rename(steps / '40.orbax-checkpoint-tmp')
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    assert reader.restore(abstract(make_state(0))).step == 20
  assert (steps / '40.orbax-checkpoint-tmp').exists()
  with checkpointer(steps) as ckpt:
    assert ckpt.restore(abstract(make_state(0))).step == 20
    ckpt.save(40, make_state(40), META)
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    assert reader.restore(abstract(make_state(0))).step == 40
  assert 'WARNING' not in capfd.readouterr().err


def test_none_whole_is_an_error_that_changes_nothing(steps):
  for step in ('10', '20', '30'):
    empty_step(steps / step)
  with checkpointer(steps) as ckpt:
    with pytest.raises(
      errors.InputError, match='No checkpoint .*step 30: .* step 10: .* --workdir'
    ):
      ckpt.restore(abstract(make_state(0)))
    with pytest.raises(ValueError, match='call restore before'):
      ckpt.save(40, make_state(40), META)
    with pytest.raises(errors.InputError, match='No checkpoint'):
      ckpt.read_meta()
  assert sorted(p.name for p in steps.iterdir()) == ['10', '20', '30']


def test_a_dangling_link_is_a_damaged_step_and_never_the_start_of_a_new_run(steps, caplog):
  (steps / '30').rename(steps.parent / 'elsewhere')
  (steps / '30').symlink_to(steps.parent / 'unmounted' / '30')
  with checkpointer(steps) as ckpt:
    assert ckpt.restore(abstract(make_state(0))).step == 20
  assert 'step 30' in caplog.text and 'a link to what is not there' in caplog.text
  assert (steps / '30.damaged-1').is_symlink()
  for step in ('10', '20'):
    shutil.rmtree(steps / step)
  for ckpt in (checkpointer(steps), reader(steps)):
    with ckpt, pytest.raises(errors.InputError, match='aside, 30.damaged-1; rename'):
      ckpt.restore(abstract(make_state(0)))
  (steps / '30.damaged-1').rename(steps / '30')
  with checkpointer(steps) as ckpt, pytest.raises(errors.InputError, match='a link to what is not'):
    ckpt.restore(abstract(make_state(0)))
  with reader(steps) as ckpt, pytest.raises(errors.InputError, match='a link to what is not'):
    ckpt.read_meta()
  (steps / '30').unlink()
  (steps / '30').write_text('no directory')
  with checkpointer(steps) as ckpt, pytest.raises(errors.InputError, match='it is no directory'):
    ckpt.restore(abstract(make_state(0)))
  link = steps.parent / 'link'
  link.symlink_to(steps.parent / 'unmounted')
  with pytest.raises(errors.InputError, match='link is a link to what is not there'):
    checkpointer(link)


def reader(path):
  return checkpointer_lib.Checkpointer(path, None, read_only=True)


def test_a_reader_of_a_run_that_goes_on_finds_the_step_that_has_come(steps, monkeypatch, caplog):
  """The run keeps one step, and saves the next one whenever this one is read."""
  others = steps.parent / 'others'
  others.mkdir()
  for step in ('20', '30'):
    (steps / step).rename(others / step)
  read = checkpointer_lib.Checkpointer._read_record

  def trained_meanwhile(self, step):
    after = {10: '20', 20: '30'}.get(step)
    if after and (others / after).exists():
      (others / after).rename(steps / after)
      shutil.rmtree(steps / str(step))
    return read(self, step)

  monkeypatch.setattr(checkpointer_lib.Checkpointer, '_read_record', trained_meanwhile)
  with reader(steps) as ckpt:
    assert ckpt.restore(abstract(make_state(0))).step == 30
  assert not caplog.records  # what was deleted was not damaged

  def always_deleted(self, step):
    shutil.rmtree(steps / str(step))
    (steps / str(step + 1)).mkdir()
    return read(self, step)

  monkeypatch.setattr(checkpointer_lib.Checkpointer, '_read_record', always_deleted)
  with reader(steps) as ckpt, pytest.raises(errors.InputError, match='it was deleted while'):
    ckpt.restore(abstract(make_state(0)))
  assert [path.name for path in steps.iterdir()] == [str(30 + checkpointer_lib.LOOKS)]


def test_a_step_asked_for_is_given_or_refused(steps):
  truncate_chunk(steps / '20')
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    assert reader.restore(abstract(make_state(0)), step=10).step == 10
    with pytest.raises(errors.InputError, match='step 20: its arrays.*choose one of 10, 30'):
      reader.restore(abstract(make_state(0)), step=20)
    with pytest.raises(errors.InputError, match='step=25 .*choose one of 10, 20, 30'):
      reader.restore(abstract(make_state(0)), step=25)
    with pytest.raises(errors.InputError, match='step=25'):
      reader.read_meta(step=25)


def test_a_writer_that_goes_back_moves_newer_steps_aside(steps):
  with checkpointer(steps) as ckpt:
    assert ckpt.restore(abstract(make_state(0)), step=10).step == 10
  assert sorted(p.name for p in steps.iterdir()) == ['10', '20.superseded-1', '30.superseded-1']


def test_repeated_damage_keeps_every_copy(steps):
  (steps / '30.damaged-1').mkdir()
  truncate_chunk(steps / '30')
  with checkpointer(steps) as ckpt:
    ckpt.restore(abstract(make_state(0)))
  assert sorted(p.name for p in steps.iterdir()) == ['10', '20', '30.damaged-1', '30.damaged-2']


def test_damaged_steps_do_not_count_for_keep_last(steps):
  truncate_chunk(steps / '20')
  truncate_chunk(steps / '30')
  with checkpointer(steps, keep_last=2) as ckpt:
    assert ckpt.restore(abstract(make_state(0))).step == 10
    ckpt.save(20, make_state(20), META)
    ckpt.wait()
    assert ckpt.steps() == [10, 20]
  assert (steps / '10').is_dir()


def test_keeps_the_newest_and_the_multiples(tmp_path):
  with checkpointer(tmp_path, keep_last=2, keep_every=20, save_every=5) as ckpt:
    assert not ckpt.save(3, make_state(3), {})
    assert ckpt.save(3, make_state(3), {}, force=True)
    assert not ckpt.save(3, make_state(3), {}, force=True)
    for step in range(5, 50, 5):
      assert ckpt.save(step, make_state(step), {})
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [20, 40, 45]


def test_read_meta_needs_no_arrays(steps):
  chunks(steps / '30')[0].unlink()
  (steps / '20/meta/metadata').unlink()
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    assert reader.read_meta()['step'] == 30
    assert reader.read_meta(step=10)['config']['train']['seed'] == 3
    with pytest.raises(errors.InputError, match='step 20: its meta cannot be read'):
      reader.read_meta(step=20)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda s: make_state(0, dim=12), r'params/bias is float32\[16\] in .* but float32\[12\]'),
    (
      lambda s: s.replace(params={**s.params, 'new': jnp.zeros(2)}),
      r'params/new is absent .* but float32\[2\]',
    ),
    (
      lambda s: s.replace(params={k: v for k, v in s.params.items() if k != 'mask'}),
      r'params/mask is bool\[3\] .* but absent',
    ),
    (
      lambda s: s.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), s.params)),
      r'params/bias is float32\[16\] .* but bfloat16\[16\]',
    ),
  ],
)
def test_a_different_model_is_an_input_error(saved, change, message):
  with checkpointer_lib.Checkpointer(saved, None) as reader:
    with pytest.raises(errors.InputError, match=message):
      reader.restore(abstract(change(make_state(0))))


def bytes_read() -> int:
  found = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
  return sum(metric['values'][0]['value'] for metric in found)


def test_a_part_is_restored_without_reading_the_rest(tmp_path):
  state = make_state(10)
  moment = jax.random.normal(jax.random.key(0), (1024, 1024))
  state = state.replace(opt_state={'mu': moment, 'nu': moment})
  part = {'params': state.params}
  with checkpointer(tmp_path) as ckpt:
    ckpt.save(10, state, META)
    ckpt.wait()
    before = bytes_read()
    restored = ckpt.restore(abstract(part), partial=True)
    read_for_part = bytes_read() - before
    ckpt.restore(abstract(state))
    read_for_all = bytes_read() - before - read_for_part
  assert_same(restored.state, part)
  assert restored.step == 10 and restored.meta['data'] == 'fingerprint'
  # Random floats compress by less than a tenth.
  assert read_for_all > 1.8 * moment.nbytes and read_for_part < 0.01 * moment.nbytes


def test_a_part_is_verified_and_falls_back(steps, caplog):
  truncate_chunk(steps / '30')
  part = {'params': make_state(20).params}
  with checkpointer_lib.Checkpointer(steps, None) as reader:
    restored = reader.restore(abstract(part), partial=True)
    assert restored.step == 20 and 'Using step 20' in caplog.text
    assert_same(restored.state, part)
    sums = reader.read_record(10)['leaves']
    assert {'params/bias', 'params/block/kernel'} < set(sums)
    assert sums['params/bias']['checksum'] == integrity.checksums(part)['params/bias']


def test_a_part_that_is_absent_or_different_is_an_input_error(saved):
  params = make_state(0).params
  with checkpointer_lib.Checkpointer(saved, None) as reader:
    for part, message in (
      (
        {'router_state': {'bias': jnp.zeros(2)}},
        r'router_state/bias is absent .* but float32\[2\]',
      ),
      ({'params': {'bias': jnp.zeros(3)}}, r'params/bias is float32\[16\] in .* but float32\[3\]'),
    ):
      with pytest.raises(errors.InputError, match=message):
        reader.restore(abstract(part), partial=True)
    with pytest.raises(errors.InputError, match='step is int32.* but absent'):
      reader.restore(abstract({'params': params}))


def test_a_full_restore_of_weights_alone_says_where_to_go(tmp_path):
  state = make_state(10)
  with checkpointer(tmp_path / 'checkpoints') as ckpt:
    ckpt.save(10, {'params': state.params}, META)
    message = f'weights only, .*--config.init_from={tmp_path} and another --workdir'
    with pytest.raises(errors.InputError, match=message):
      ckpt.restore(abstract(state))


def test_restores_to_another_sharding(saved, tmp_path):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))

  def spec(x):
    divides = x.ndim and x.shape[0] % 8 == 0
    return jax.P('data') if divides else jax.P()

  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec(x))
    ),
    make_state(0),
  )
  with checkpointer_lib.Checkpointer(saved, None) as reader:
    restored = reader.restore(target)
  assert len(restored.state.params['bias'].sharding.device_set) == 8
  assert_same(restored.state, make_state(30))
  # And back: saved from eight devices, restored to one.
  with checkpointer(tmp_path) as ckpt:
    ckpt.save(30, restored.state, META)
    back = ckpt.restore(abstract(make_state(0)))
  assert_same(back.state, make_state(30))
  assert len(back.state.params['bias'].sharding.device_set) == 1


def test_saved_and_restored_states_may_be_donated(tmp_path):
  @jax.jit
  def bump(state):
    return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state)

  donate = jax.jit(bump, donate_argnums=0)
  with checkpointer(tmp_path) as ckpt:
    state = make_state(10)
    ckpt.save(10, state, META)
    donate(state)  # overwrites the buffers while the save is in flight
    state = ckpt.restore(abstract(make_state(0))).state
    expected = bump(make_state(10))
    assert_same(donate(state), expected)


def test_a_disk_without_room_is_one_line_with_the_last_step_saved(steps, monkeypatch):
  def full(*unused, **unused_kwargs):
    raise ValueError('RESOURCE_EXHAUSTED: Failed to write "c/0" [OS error 28: ENOSPC No space left '
                     'on device]')  # fmt: skip

  line = (
    r'no room on the disk for .*checkpoints/a checkpoint: [\d,]+ bytes are needed and [\d,]+ are '
    r'free; .*; step 30 is the last one saved$'
  )
  for name in ('save', 'wait_until_finished'):
    with pytest.raises(errors.InputError, match=line), checkpointer(steps) as ckpt:
      ckpt.restore(abstract(make_state(0)))
      monkeypatch.setattr(ckpt._manager, name, full)
      monkeypatch.setattr(ckpt._manager, 'close', full)  # raises the same once more
      ckpt.save(40, make_state(40), META)
      ckpt.wait()
    shutil.rmtree(steps / '40', ignore_errors=True)

  def other(*unused, **unused_kwargs):
    raise ValueError('another mistake')

  with checkpointer(steps) as ckpt, pytest.raises(ValueError, match='another mistake'):
    ckpt.restore(abstract(make_state(0)))
    monkeypatch.setattr(ckpt._manager, 'save', other)
    ckpt.save(50, make_state(50), META)
