"""The CSV files of a comparison."""

import csv

from moe_jax.analysis.comparison import comparison, tables
from tests.analysis.comparison import written


def read(path):
  return list(csv.DictReader(path.open()))


def test_four_tables(tmp_path):
  found = comparison.compare(written.two_groups(tmp_path))
  curves, held_out, differences, verdicts = map(read, tables.write(found, tmp_path))
  assert len(curves) == 2 * 3 * 12
  assert curves[0] == {
    **{'arm': 'plain', 'seed': '0', 'step': '2', 'tokens': '256', 'flops': curves[0]['flops']},
    **{'seconds': '4', 'loss': '2', 'max_vio': '0.5', 'drop_rate': '0'},
  }
  assert [row['bits_per_byte'] for row in held_out[3:]] == ['0.8', '0.901', '1.002']
  assert len(differences) == 12 and differences[0]['mean'] == '-0.199'
  assert [(row['figure'], row['verdict'], row['pairs']) for row in verdicts] == [
    *(('bits_per_byte', 'lower', '3'), ('max_vio', 'not distinguishable', '3')),
  ]


def test_reasons_stand_where_no_difference_does(tmp_path):
  found = comparison.compare(written.two_groups(tmp_path, tokenizer='{"other": 1}'))
  *_, differences, verdicts = map(read, tables.write(found, tmp_path))
  assert differences == []
  assert (verdicts[0]['mean'], verdicts[0]['why']) == ('', 'the tokenizers differ')
