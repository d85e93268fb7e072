import io
import zipfile

import numpy as np
import pytest

from moe_jax.data import npz_files


def test_headers_and_arrays(tmp_path):
  arrays = {'a': np.arange(6).reshape(2, 3), 'b': np.float32(2.5), 'c': np.zeros((0, 4))}
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / 'a.npz', **arrays)
    found = npz_files.headers(tmp_path / 'a.npz')
    assert {k: v[0] for k, v in found.items()} == {'a': (2, 3), 'b': (), 'c': (0, 4)}
    for name, array in arrays.items():
      np.testing.assert_array_equal(npz_files.read(tmp_path / 'a.npz', name), array)
      assert npz_files.num_bytes(*found[name]) == np.asarray(array).nbytes


def archive(path, header: str, body: bytes):
  with zipfile.ZipFile(path, 'w') as file:
    length = len(header).to_bytes(2, 'little')
    file.writestr('a.npy', b'\x93NUMPY\x01\x00' + length + header.encode() + body)
  return path


@pytest.mark.parametrize(
  'shape, kind',
  [((10**9,), '<i8'), ((10**30,), '<i8'), ((-1,), '<i8'), ((1,), '|O'), ((3,), '<i8')],
)
def test_a_header_that_claims_what_is_not_there_is_refused_before_any_data(tmp_path, shape, kind):
  header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n"
  with pytest.raises(npz_files.DAMAGE, match='plain array|cannot be read'):
    npz_files.headers(archive(tmp_path / 'a.npz', header, bytes(8)))


def test_pickles_and_nonsense_are_refused(tmp_path):
  out = io.BytesIO()
  np.save(out, np.array([{}]), allow_pickle=True)
  with zipfile.ZipFile(tmp_path / 'b.npz', 'w') as file:
    file.writestr('a.npy', out.getvalue())
  for read in (npz_files.headers, lambda path: npz_files.read(path, 'a')):
    with pytest.raises(npz_files.DAMAGE):
      read(tmp_path / 'b.npz')
  for header in ('(' * 3000, '9' * 5000, '{}', '\x00'):
    with pytest.raises(npz_files.DAMAGE, match='cannot be read'):
      npz_files.headers(archive(tmp_path / 'a.npz', header + '\n', b''))
