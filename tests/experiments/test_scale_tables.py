"""The tables of AT_SCALE.md: what is on the page is what the figures say."""

import json

import pytest

from experiments.pod_plans import scale_tables

PAGE = (scale_tables.HERE / 'AT_SCALE.md').read_text(encoding='utf-8')
FIGURES = json.loads((scale_tables.HERE / 'at_scale.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', scale_tables.TABLES)
def test_the_page_shows_the_figures(name):
  assert FIGURES['max_vio'] == scale_tables.MAX_VIO
  assert scale_tables.table(name, FIGURES[name]) in PAGE


def test_goodput_is_made_from_what_the_page_states():
  assert FIGURES['goodput'] == scale_tables.goodput()
  assert '50,000 hours' in PAGE and '600 s' in PAGE


def test_what_fits_nowhere_says_so():
  text = scale_tables.table('best', [{'page': 'deepseek_v3', 'topology': 'v5p:2x2x1'}])
  assert text.splitlines()[-1] == '| deepseek_v3 | v5p:2x2x1 | nothing fits |'
