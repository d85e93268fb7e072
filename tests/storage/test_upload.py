import pytest
import safetensors.numpy

from moe_jax import errors
from moe_jax.api import load
from moe_jax.interop import huggingface
from moe_jax.storage import bucket, fetch, upload, urls
from tests import tiny
from tests.interop import checkpoints, conversions


def write(place):
  (place / 'sub').mkdir(parents=True)
  (place / 'a').write_text('one')
  (place / 'sub/b').write_text('two')


def test_a_path_here_is_that_path(tmp_path):
  with upload.folder(tmp_path / 'a', '--to_hf') as made:
    assert made == tmp_path / 'a'


def test_a_folder_arrives_whole_and_leaves_nothing_here(objects, tmp_path):
  with upload.folder('gs://b1/out', '--to_hf') as made:
    write(made)
    assert made.name == 'out'
  assert sorted(objects.find('b1')) == ['b1/out/a', 'b1/out/sub/b']
  assert [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()] == []
  with pytest.raises(errors.InputError, match='--to_hf=gs://b1/out must hold nothing'):
    with upload.folder('gs://b1/out', '--to_hf'):
      pass


def test_a_block_that_fails_uploads_nothing(objects):
  with pytest.raises(KeyboardInterrupt):
    with upload.folder('gs://b1/out', '--to_hf') as made:
      write(made)
      raise KeyboardInterrupt
  assert objects.find('b1') == {}


def test_an_upload_that_was_cut_off_is_not_read_and_is_replaced(objects, monkeypatch):
  plain = objects.put

  def put(files, paths, **unused):
    plain(files[:1], paths[:1])
    raise ConnectionResetError('cut')

  monkeypatch.setattr(objects, 'put', put)
  with pytest.raises(errors.InputError, match='broke off.*cut'):
    with upload.folder('gs://b1/out', '--to_hf') as made:
      write(made)
  with pytest.raises(errors.InputError, match='its upload was cut off'):
    fetch.local('gs://b1/out')
  monkeypatch.setattr(objects, 'put', plain)
  with upload.folder('gs://b1/out', '--to_hf') as made:
    made.mkdir()
    (made / 'c').write_text('three')
  assert list(objects.find('b1')) == ['b1/out/c']


def test_an_object_that_did_not_arrive_is_named(objects, monkeypatch):
  monkeypatch.setattr(objects, 'put', lambda files, paths: None)
  with pytest.raises(errors.InputError, match='out/.* did not arrive whole'):
    with upload.folder('gs://b1/out', '--to_hf') as made:
      write(made)


@pytest.mark.slow
def test_a_checkpoint_goes_through_a_server_and_comes_back(server, tmp_path):
  address, _ = server
  hf = checkpoints.config('deepseek_v2')
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  url = urls.parse(address)
  bucket.Bucket(url).put({f'in/{p.name}': p for p in original.iterdir()})
  huggingface.import_checkpoint(f'{address}/in', tiny.values(), f'{address}/run')
  conversions.export(f'{address}/run', f'{address}/out')
  copy = fetch.local(f'{address}/out')
  assert conversions.contents(copy) == conversions.contents(original)
  weights = [safetensors.numpy.load_file(p / 'model.safetensors') for p in (copy, original)]
  assert {k: v.tobytes() for k, v in weights[0].items()} == {
    k: v.tobytes() for k, v in weights[1].items()
  }
  assert load.is_downloaded(f'{address}/out')
  run = load.load(f'{address}/run')
  assert run.config.data.tokenizer == f'{address}/run/tokenizer.json'
  with pytest.raises(errors.InputError, match='must hold nothing'):
    conversions.export(f'{address}/run', f'{address}/out')
