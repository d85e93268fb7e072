"""The page, opened and clicked in a headless browser, where one is at hand (extra `browser`)."""

import shutil

import pytest

from moe_jax.analysis.comparison import comparison, files, pictures
from tests.analysis.comparison import written

pytestmark = pytest.mark.slow

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
# Names of the curves in a chart, bands left out.
NAMES = 'id => document.getElementById(id).data.filter(t => t.name).map(t => t.name)'


@pytest.fixture(scope='module')
def browser():
  sync_api = pytest.importorskip('playwright.sync_api', reason='needs the extra browser')
  found = next(filter(None, map(shutil.which, BROWSERS)), None)
  if found is None:
    pytest.skip(f'none of these browsers is here: {", ".join(BROWSERS)}')
  with sync_api.sync_playwright() as playwright:
    opened = playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])
    yield opened
    opened.close()


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """A page of three groups, the last of which is no pair; its name is markup."""
  pytest.importorskip('plotly', reason='needs the extra compare')
  top = tmp_path_factory.mktemp('runs')
  runs = written.two_groups(top)
  runs.append(written.run(top / '<b>other<', train__batch_size=4, loss=0.5))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pictures, 'draw', lambda found, out: [])
    return files.write(comparison.compare(runs), top / 'out').page


@pytest.fixture
def page(browser, path):
  """The page, off the network; fails on whatever it complains of."""
  context = browser.new_context(offline=True)
  opened, wrong = context.new_page(), []
  opened.on('pageerror', lambda error: wrong.append(str(error)))
  opened.on('console', lambda line: wrong.append(line.text) if line.type == 'error' else None)
  opened.on(
    'request',
    lambda r: None if r.url.startswith(('file:', 'data:', 'blob:')) else wrong.append(r.url),
  )
  opened.goto(path.as_uri())
  opened.wait_for_selector('#load-0 .heatmaplayer', state='attached')
  yield opened
  context.close()
  assert wrong == []


def test_arms_are_switched_off_and_on_in_every_chart(page):
  charts = ('curves', 'difference', 'held-out', 'balance')
  before = {chart: page.evaluate(NAMES, chart) for chart in charts}
  assert before['curves'] == ['plain', 'bias', '<b>other<']
  assert set(before['difference']) == {'bias'}  # the other is no pair, and says why
  assert 'the data order differs (train.batch_size: 4 and 8)' in page.inner_text(
    '#difference-words'
  )
  button = page.locator('#bar button.arm').nth(1)
  button.click()
  assert button.get_attribute('aria-pressed') == 'false'
  assert all('bias' not in page.evaluate(NAMES, chart) for chart in charts)
  assert not page.is_visible('#load-1') and page.is_visible('#load-0')
  assert page.locator('tr.off[data-arm=bias]').count() >= 2
  button.click()
  assert {chart: page.evaluate(NAMES, chart) for chart in charts} == before


def test_axes(page):
  x = "() => document.getElementById('curves').data.find(t => t.name === 'plain').x.slice(0, 2)"
  assert page.evaluate(x) == [256, 512]
  page.select_option('#choose-x', 'seconds')
  assert page.evaluate(x) == [4, 8]
  page.check('#check-logx')
  page.check('#check-logy')
  layout = "() => ['xaxis', 'yaxis'].map(a => document.getElementById('curves').layout[a].type)"
  assert page.evaluate(layout) == ['log', 'log']
  page.check('#check-seeds')
  assert page.evaluate(NAMES, 'curves')[:2] == ['plain, seed 0', 'plain, seed 1']


def test_tables_are_sorted_by_what_is_clicked(page):
  table = page.locator('table', has_text='bits per byte').filter(has_text='seeds')
  head = table.locator('th button', has_text='bits per byte')

  def arms():
    return [row.split('\t')[0].strip() for row in table.locator('tbody tr').all_inner_texts()]

  head.click()
  assert arms() == ['<b>other<', 'bias', 'plain']  # 0.5, 0.9, 1.1
  head.click()
  assert arms() == ['plain', 'bias', '<b>other<']
  assert table.locator('th[aria-sort=descending]').count() == 1


def test_the_slider_moves_all_loads_and_the_baseline_all_verdicts(page):
  assert page.inner_text('#step-text') == 'step 24'
  page.locator('#step').press('Home')
  assert page.inner_text('#step-text') == 'step 8'
  assert page.locator('text=bias, seed 0, step 8: MaxVio 0.25').count() == 1
  assert 'Lower: bias against plain' in page.inner_text('#claims')
  page.select_option('#choose-baseline', 'bias')
  assert 'Higher: plain against bias' in page.inner_text('#claims')
  assert 'plain' in page.evaluate(NAMES, 'difference')


def test_values_show_under_the_pointer(page):
  chart = page.locator('#curves')
  chart.scroll_into_view_if_needed()
  box = page.locator('#curves .nsewdrag').bounding_box()
  page.mouse.move(box['x'] + box['width'] * 0.5, box['y'] + box['height'] * 0.6)
  page.wait_for_selector('#curves .hoverlayer .legendtext, #curves .hoverlayer .hovertext')
  assert 'plain' in page.locator('#curves .hoverlayer').text_content()
