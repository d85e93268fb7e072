import errno
import json
import os

import jax

from moe_jax.devices import peak_flops


def test_matmul_peak_is_measured_and_cached(tmp_path, monkeypatch, caplog):
  cache = tmp_path / 'cache'
  peak = peak_flops.matmul_peak('float32', cache)
  assert 1e8 < peak < 1e16
  (key,) = json.loads((cache / 'matmul_peak.json').read_text())
  assert jax.devices()[0].device_kind in key and 'float32' in key and jax.__version__ in key
  monkeypatch.setattr(peak_flops, 'measure_peak', lambda *_: 7e9)
  assert peak_flops.matmul_peak('float32', cache) == peak, 'eight virtual devices count once'
  assert peak_flops.matmul_peak('bfloat16', cache) == 7e9
  assert len(json.loads((cache / 'matmul_peak.json').read_text())) == 2
  for broken in ('{"a": 1', '[]', '{"a": -1.0}', '{"a": "fast"}'):
    caplog.clear()
    (cache / 'matmul_peak.json').write_text(broken)
    assert peak_flops.matmul_peak('float32', cache) == 7e9
    assert 'unusable' in caplog.text


def test_matmul_peak_without_a_writable_cache(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(peak_flops, 'measure_peak', lambda *_: 7e9)
  (tmp_path / 'file').write_text('')
  assert peak_flops.matmul_peak('float32', tmp_path / 'file' / 'cache') == 7e9
  assert 'not cached' in caplog.text


def test_matmul_peak_on_a_full_disk(tmp_path, monkeypatch, caplog):
  def full(*unused):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(peak_flops, 'measure_peak', lambda *_: 7e9)
  monkeypatch.setattr(os, 'replace', full)
  assert peak_flops.matmul_peak('float32', tmp_path / 'cache') == 7e9
  assert 'not cached' in caplog.text and 'no room on the disk' in caplog.text
