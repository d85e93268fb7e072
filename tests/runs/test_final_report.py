"""`finish` and `draw` are tested with a whole run in test_run.py."""

import gzip
import random

import pytest

from moe_jax.runs import final_report


def test_compressors_report_bits_per_byte():
  noise = random.Random(0).randbytes(100_000)
  for value in final_report.compressed_bits_per_byte(noise).values():
    assert value == pytest.approx(8, rel=2e-3)  # noise does not compress; headers are small
  text = b'all work and no play ' * 5000
  expected = 8 * len(gzip.compress(text, 9)) / len(text)
  found = final_report.compressed_bits_per_byte(text)
  assert found['gzip -9'] == pytest.approx(expected) and 0 < found['xz -9'] < 0.1
