"""The study: what its arms cost, verdicts from constructed figures, and (slow) the command."""

import base64
import copy
import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from experiments.common import html_report, local_jobs, spread, step_rates
from experiments.routing_ablation import __main__ as command
from experiments.routing_ablation import (
  arms,
  earlier,
  learning_rates,
  lengths,
  matching,
  measure,
  over_tokens,
  report,
)
from experiments.routing_ablation import study as study_lib
from moe_jax import errors
from moe_jax.analysis import difference_curves, paired
from moe_jax.runs import metric_log
from tests import in_process, tiny
from tests.experiments import test_routing_ablation_arms as arm_tests

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')


def test_seeds():
  assert local_jobs.seeds(['3']) == [0, 1, 2] and local_jobs.seeds(['4', '2']) == [4, 2]
  assert local_jobs.seeds(['7', '7']) == [7]
  for wrong in (['a'], ['0']):
    with pytest.raises(errors.InputError, match='--seeds'):
      local_jobs.seeds(wrong)


def test_spread_of_one_value_and_of_none():
  assert spread.spread([1.25], 2) == '1.25'
  assert spread.spread([1.0, float('nan')], 2) == 'not finite'
  assert spread.spread([None], 2) == '-' and spread.spread([], 2) == '-'


def test_tokens_of_a_run_count_its_ramp(study, monkeypatch):
  # 200 steps of 4 rows of 128 tokens, then 100 of 8.
  def ramped(cfg):
    train = dataclasses.replace(cfg.train, num_steps=300, batch_size=8, batch_ramp=((200, 4),))
    return dataclasses.replace(cfg, train=train)

  configs = {name: ramped(cfg) for name, cfg in study.configs.items()}
  assert matching.tokens(configs['gshard']) == 128 * (200 * 4 + 100 * 8) == 204_800
  assert 'seeds, 204,800 to 204,800 tokens' in matching.text(study.described, configs, 2)
  study = study._replace(configs=configs)
  said = report._verdicts(study, report.grade(study.results, configs))[2]
  assert 'runs of 204,800 tokens' in said.text
  resolve = arms.resolve
  monkeypatch.setattr(arms, 'resolve', lambda *given: ramped(resolve(*given)))
  (points, *_) = lengths.points({100: study.results, 300: study.results}, 'tiny').values()
  assert [point.tokens for point in points] == [204_800] * 2


def test_speed_counts_the_tokens_of_the_steps(monkeypatch):
  monkeypatch.setattr(step_rates, 'ROUNDS', 1)
  monkeypatch.setattr(step_rates, 'STEPS', 2)
  clock = iter([10.0, 10.5])
  monkeypatch.setattr(step_rates.time, 'perf_counter', lambda: next(clock))
  dense = tiny.make(model__moe__num_experts=0, model__num_layers=1, mesh__data=8)
  # 2 steps of 8 rows of 16 tokens in half a second.
  assert step_rates.tokens_per_second({'dense': dense}) == {'dense': 512.0}


def run_of(bits, vio=0.5, dropped=0.0, **more):
  curve = {'step': [1, 2, 3], 'loss': [3.0 + bits, 3.0 + bits, 3.0 + 2 * bits]}
  curve |= {'max_vio': [vio] * 3, 'drop_rate': [None if vio is None else dropped] * 3}
  result = {'bits_per_byte': bits, 'loss': bits, 'step': 3, 'max_vio': vio, 'curve': curve}
  result |= {'commit': '0123456789', 'peak_lr': 0.006}
  return result | {'train_drop_rate': None if vio is None else dropped, 'seconds': 1800} | more


@pytest.fixture
def study(described):
  return copy.deepcopy(described)


@pytest.fixture(scope='module')
def described():
  """Two seeds; deepseekmoe better by 0.1 in both, hash against dense by +0.1 and -0.1."""
  results = {
    'gshard': {0: run_of(2.0), 1: run_of(2.2)},
    'deepseekmoe': {
      seed: run_of(bits, rise_without_shared=0.5 + 0.01 * seed)
      for seed, bits in enumerate((1.9, 2.1001))
    },
    'hash': {0: run_of(2.3), 1: run_of(2.3)},
    'dense': {0: run_of(2.2, vio=None), 1: run_of(2.4, vio=None)},
    'm2': {0: run_of(2.0), 1: run_of(2.2)},
    'm4': {0: run_of(1.9), 1: run_of(2.1)},
    'm8': {0: run_of(1.8), 1: run_of(2.0)},
  }
  configs = arm_tests.resolved('tiny', results)
  rates = dict.fromkeys(results, 1000.0) | {'dense': 1500.0}
  described = matching.describe(configs)
  tried = {0.003: {0: 2.1}, 0.006: {0: 2.0}, 0.012: {0: 2.2}}
  swept = {'gshard': learning_rates.Tried('tiny', 300, tried)}
  return report.Study('tiny', configs, results, rates, described, swept)


def test_verdicts(study):
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  better = graded['deepseekmoe against gshard: bits_per_byte']
  assert better.verdict == paired.CONFIRMED and better.difference.mean == pytest.approx(-0.09995)
  assert graded['hash against dense: bits_per_byte'].verdict == paired.UNDECIDED
  shared = graded['deepseekmoe against zero: rise_without_shared']
  assert shared.verdict == paired.CONFIRMED and shared.base == pytest.approx(2.00005)
  assert not any('1_15' in name or 'loss_free' in name for name in graded)  # not trained


def test_a_verdict_waits_where_the_training_loss_still_moves(study):
  for seed in (0, 1):  # from +0.4 to -0.1 in three steps; +0.05 held out, in doubt
    curve, base = (study.results[name][seed]['curve'] for name in ('deepseekmoe', 'gshard'))
    curve['loss'] = [b + d + 0.001 * seed for b, d in zip(base['loss'], (0.4, 0.1, -0.1))]
    study.results['deepseekmoe'][seed]['bits_per_byte'] += 0.15 + 0.01 * seed
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  main = graded['deepseekmoe against gshard: bits_per_byte']
  assert main.plain == paired.UNDECIDED and main.verdict == difference_curves.NOT_YET
  assert main.curve.tokens.tolist() == [1024.0, 2048.0, 3072.0]  # 8 rows of 128
  assert '**Not yet decided** (at this length not distinguishable): `deeps' in report.sentence(main)
  lines = over_tokens.blocks(list(graded.values()))[2].items
  assert lines[0].startswith('`deepseekmoe` against `gshard`: not yet decided at 0.003M tokens')
  assert 'below zero after 0.003M tokens' in lines[0]
  # At another peak rate the slope is one of the schedule as well.
  faster = learning_rates.with_rate(study.configs['deepseekmoe'], 0.012)
  graded = report.grade(study.results, study.configs | {'deepseekmoe': faster})
  assert [g.verdict for g in graded if g.claim == main.claim] == [paired.UNDECIDED]


def test_a_skipped_step_costs_a_claim_no_curve(study, tmp_path):
  study.results['gshard'][0]['curve']['loss'][1] = None
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  assert graded['deepseekmoe against gshard: bits_per_byte'].curve.tokens.tolist() == [1024, 3072]
  written = report.write(tmp_path, study, ['this'])
  assert 'curves.png' in {path.name for path in written}
  rows = (tmp_path / 'runs.csv').read_text().splitlines()
  assert rows[1:4] == ['gshard,0,1,5,0.5', 'gshard,0,2,,0.5', 'gshard,0,3,7,0.5']
  again = earlier._curves(earlier._rows(tmp_path / 'runs.csv'))['gshard', 0]
  assert again['loss'] == [5.0, None, 7.0]
  assert measure.curves(study.results, 'dense', 'max_vio') is None


def test_a_diverged_run_is_last_and_decides_nothing(study, tmp_path):
  run = study.results['deepseekmoe'][1]
  run |= {'bits_per_byte': float('nan'), 'loss': float('nan')}
  run['curve']['loss'] = [None] * 3
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  main = graded['deepseekmoe against gshard: bits_per_byte']
  assert main.verdict == paired.UNDECIDED and main.p_value == 1.0 and main.curve is None
  assert ': not finite, 2 seeds.' in report.sentence(main)
  report.write(tmp_path, study, ['this'])
  text = (tmp_path / 'report.md').read_text()
  rows = [line for line in text.splitlines() if line.startswith('| `')]
  order = [row.split('`')[1] for row in rows[: len(study.results)]]
  assert order[-1] == 'deepseekmoe' and '| not finite | not finite |' in rows[len(order) - 1]
  assert 'deepseekmoe' not in (tmp_path / 'pairs.csv').read_text()
  # Such a rate is no best one, wherever it is among those that were tried.
  tried = {0.003: {0: float('nan')}, 0.006: {0: 2.0}, 0.012: {0: float('inf')}}
  swept = {'gshard': learning_rates.Tried('tiny', 300, tried)}
  assert learning_rates.best(swept) == {'gshard': 0.006}


def test_holm_reads_all_claims_together(study):
  # Differences of -0.1 and -0.091: t = 21 with one degree of freedom, p = 0.03, one of five.
  study.results['deepseekmoe'][1]['bits_per_byte'] = 2.109
  graded = report.grade(study.results, study.configs)
  by_hand = paired.holm([g.p_value for g in graded])
  for one, p in zip(graded, by_hand):
    assert one.holm == (one.plain if p <= 0.05 else paired.UNDECIDED)
  lost = [g for g in graded if g.holm != g.plain]
  assert lost and 'not distinguishable when all claims are read together' in report.sentence(
    lost[0]
  )


def test_slope_of_a_sweep(study):
  slope, parabola = report.slope(study.results, arms.SWEEPS[0])
  assert slope.mean == pytest.approx(-0.1) and slope.low == pytest.approx(-0.1)
  np.testing.assert_allclose(parabola, [0.0, -0.1, 2.2], atol=1e-9)  # of the logarithm to base 2
  assert report.slope(study.results, arms.SWEEPS[1]) is None


def test_a_sweep_is_lowest_among_its_trained_points_or_nowhere(study):
  """Parabolas in log2 m through m = 2, 4 and 8, lowest at 2.5 and at 3.5."""

  def line(bottom, *names):
    for at, name in enumerate(names, start=1):
      study.results[name] = dict.fromkeys((0, 1), run_of(2.0 + 0.01 * (at - bottom) ** 2))
    (found,) = report._verdicts(study, [])[2].items
    return found

  assert line(2.5, 'm2', 'm4', 'm8').endswith('; the parabola through the means is lowest at 5.7.')
  assert line(3.5, 'm2', 'm4', 'm8').endswith(' of m, parts of a conventional expert.')
  assert line(3.5, 'm2', 'm4', 'm8', 'm16').endswith(' is lowest at 11.3.')


def test_report_is_whole(study, tmp_path):
  written = report.write(tmp_path / 'out', study, ['python -m this'])
  names = {path.name for path in written}
  pictures = {'arms.png', 'claims.png', 'curves.png', 'balance.png', 'granularity.png'}
  pictures |= {'difference.png', 'differences.png', 'pairs.png'}
  assert names == pictures | {
    'report.md',
    'report.html',
    'results.csv',
    'differences.csv',
    'runs.csv',
    'rates.csv',
    'pairs.csv',
  }
  text = (tmp_path / 'out' / 'report.md').read_text()
  assert (
    text.index('## Verdict')
    < text.index('## Against tokens')
    < text.index('## Figures')
    < text.index('## Do it again')
  )
  assert '**Confirmed**: `deepseekmoe` against `gshard`' in text
  assert '1 not distinguishable' in text and '    python -m this' in text
  rows = [line for line in text.splitlines() if line.startswith('| `')]
  assert rows[0].startswith('| `m8` ') and '| 1.9000 ± 0.1414 | -0.2000 ± 0.0000 |' in rows[0]
  assert '| 1,500 | 1.50 |' in next(row for row in rows if row.startswith('| `dense` '))
  html = (tmp_path / 'out' / 'report.html').read_text()
  assert html.count('src="data:image/png;base64,') == len(pictures) == html.count('src=')
  lines = (tmp_path / 'out' / 'results.csv').read_text().splitlines()
  assert len(lines) == 1 + 14
  assert lines[0].startswith('arm,seed,bits_per_byte,max_vio')
  assert lines[1].startswith('gshard,0,2.0,0.5,')
  lines = (tmp_path / 'out' / 'runs.csv').read_text().splitlines()
  assert lines[0] == 'arm,seed,step,loss,max_vio' and len(lines) == 1 + 14 * 3
  assert lines[1:4] == ['gshard,0,1,5,0.5', 'gshard,0,2,5,0.5', 'gshard,0,3,7,0.5']


@pytest.fixture
def published(study, written, tmp_path):
  """(the study with pages of three steps, directory of its report)."""
  shutil.copytree(written, tmp_path, dirs_exist_ok=True)
  return _of_three_steps(study), tmp_path


@pytest.fixture(scope='module')
def written(described, tmp_path_factory):
  directory = tmp_path_factory.mktemp('published')
  report.write(directory, _of_three_steps(described), ['python -m this'])
  return directory


def _of_three_steps(study):
  configs = {
    name: dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=3))
    for name, cfg in study.configs.items()
  }
  return study._replace(configs=configs)


def test_runs_of_an_earlier_report_say_the_same(published):
  study, directory = published
  again = earlier.joined(earlier.read(directory, study.configs, 'tiny'), {})
  assert {name: list(runs) for name, runs in again.items()} == dict.fromkeys(study.configs, [0, 1])
  for one, other in zip(
    report.grade(study.results, study.configs), report.grade(again, study.configs), strict=True
  ):
    assert one._replace(curve=None) == other._replace(curve=None)
    if one.curve is not None:
      np.testing.assert_allclose(one.curve.differences, other.curve.differences, rtol=1e-5)
  assert measure.hours_text(again) == '7.0 hours' and measure.commits(again) == ['0123456789']
  assert learning_rates.from_csv(directory / learning_rates.FILE) == study.swept


def test_a_published_report_gives_its_verdicts_again(tmp_path, monkeypatch):
  """All seeds are there, so nothing is trained: the tables hold what the report says."""
  published = ROOT / 'experiments/routing_ablation/tiny_3000'
  monkeypatch.setattr(study_lib, '_train', lambda *_: pytest.fail('nothing is to be trained'))
  given = []

  def rates(unused_workdir, configs, known):
    given.append(known)
    return dict.fromkeys(configs, 1.0)

  monkeypatch.setattr(measure, 'rates', rates)
  flags = ('--steps=3000', '--arms=gshard,deepseekmoe', '--seeds=5', '--together=1')
  flags += (f'--earlier={published}', f'--workdir={tmp_path}', f'--out={tmp_path / "out"}')
  in_process.run(command, *flags)
  assert {'gshard', 'mla', 'e127'} <= set(given[0])  # whose speed is not measured again

  def verdicts(directory):
    text = (directory / 'report.md').read_text()
    return [line for line in text.splitlines() if line.startswith('- **')]

  assert len(verdicts(published)) >= 12 and verdicts(tmp_path / 'out') == verdicts(published)


def test_an_older_report_was_trained_at_the_rates_of_the_pages(published):
  study, directory = published
  path = directory / 'results.csv'
  header, *lines = path.read_text().splitlines()
  at = header.split(',').index('peak_lr')
  without = [
    ','.join(c for i, c in enumerate(row.split(',')) if i != at) for row in (header, *lines)
  ]
  path.write_text('\n'.join(without) + '\n')
  read = earlier.read(directory, study.configs, 'tiny')
  assert read['gshard'][0]['peak_lr'] == study.configs['gshard'].optim.peak_lr == 0.006


def test_a_report_without_curves_gives_its_figures(published):
  study, directory = published
  (directory / 'runs.csv').unlink()
  results = earlier.read(directory, study.configs, 'tiny')
  results['gshard'][7] = study.results['gshard'][0]
  graded = report.grade(results, study.configs)
  assert [g.verdict for g in graded] == [
    g.plain for g in report.grade(study.results, study.configs)
  ]
  assert not any(g.curve for g in graded)
  written = report.write(directory / 'again', study._replace(results=results), ['this'])
  names = {path.name for path in written}
  assert {'arms.png', 'claims.png'} <= names and not {'curves.png', 'difference.png'} & names
  rows = (directory / 'again' / 'runs.csv').read_text().splitlines()
  assert len(rows) == 1 + 3 and rows[1].startswith('gshard,7,1,')


def test_runs_of_an_earlier_report_stand_beside_new_ones(published):
  """New seeds, new arms, arms of the report that are not asked for; its own runs come first."""
  study, directory = published
  read = earlier.read(directory, study.configs, 'tiny')
  new = {'gshard': {5: run_of(1.5, seconds=None), 1: run_of(9.9)}, 'switch': {0: run_of(2.1)}}
  both = earlier.joined(read, new)
  assert list(both) == [name for name in arms.ARMS if name in study.configs or name == 'switch']
  assert measure.column(both, 'gshard', arms.BITS) == [2.0, 2.2, 1.5]
  assert measure.hours_text(both) == '7.5 hours for 15 of 16 runs'


def test_an_earlier_report_that_does_not_fit_is_refused(published):
  study, directory = published
  read = earlier.read(directory, study.configs, 'tiny')
  earlier.check(directory, read, study.configs)
  with pytest.raises(
    errors.InputError, match='runs of 3 steps, where gshard is to have 3000; give'
  ):
    earlier.check(directory, read, arm_tests.resolved('tiny', ['gshard']))
  faster = {'m4': learning_rates.with_rate(study.configs['m4'], 0.012)}
  with pytest.raises(errors.InputError, match='m4 at a peak rate of 0.006, .*have 0.012; give'):
    earlier.check(directory, read, faster)
  with pytest.raises(errors.InputError, match='results.csv is missing there'):
    earlier.read(directory / 'no', study.configs, 'tiny')
  with pytest.raises(errors.InputError, match='has runs at --scale=tiny, where --scale=mini is'):
    earlier.read(directory, study.configs, 'mini')
  path = directory / 'results.csv'
  path.write_text(path.read_text().replace('gshard,', 'gshart,'))
  with pytest.raises(errors.InputError, match="'gshart' in results.csv is none of the arms"):
    earlier.read(directory, study.configs, 'tiny')


def test_claims_are_graded_over_the_seeds_that_both_arms_have(study):
  study.results['gshard'] |= {2: run_of(9.0), 7: run_of(2.4)}
  study.results['deepseekmoe'] |= {3: run_of(9.0), 7: run_of(2.2)}
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  main = graded['deepseekmoe against gshard: bits_per_byte']
  assert main.difference.num_seeds == 3 == len(main.curve.differences)
  assert main.difference.mean == pytest.approx((-0.1 - 0.0999 - 0.2) / 3)
  assert ', 3 seeds. The paper' in report.sentence(main)
  del study.results['dense'][0], study.results['hash'][1]
  names = [g.claim.name for g in report.grade(study.results, study.configs)]
  assert not any(name.startswith('hash against dense') for name in names)


def test_claims_against_the_length_of_training(study, tmp_path):
  """Reports of two lengths, one of them in two directories; differences by hand."""
  for steps, gain, seeds in ((100, 0.0, (0, 1)), (300, 0.3, (0, 1)), (300, 0.3, (2,))):
    results = {
      name: {
        seed: run_of(2.0 - (gain + 0.01 * seed if name == 'deepseekmoe' else 0)) | {'step': steps}
        for seed in seeds
      }
      for name in ('gshard', 'deepseekmoe', 'hash')
    }
    one = study._replace(results=results, configs=arm_tests.resolved('tiny', results))
    directory = tmp_path / f'{steps}_{seeds[0]}'
    directory.mkdir()
    (directory / 'results.csv').write_text(report.csv_text(one))
  given = [str(tmp_path / name) for name in ('300_0', '100_0', '300_2')]
  runs = lengths.read([pathlib.Path(one) for one in given], 'tiny')
  assert list(runs) == [100, 300]
  found = lengths.points(runs, 'tiny')
  assert [claim.name for claim in found] == ['deepseekmoe against gshard: bits_per_byte']
  (some,) = found.values()
  assert [point.tokens for point in some] == [102_400, 307_200]
  assert some[1].graded.difference.mean == pytest.approx(-0.31)
  assert [point.graded.difference.num_seeds for point in some] == [2, 3]
  in_process.run(lengths, f'--reports={",".join(given)}', f'--out={tmp_path / "out"}')
  text = (tmp_path / 'out' / 'lengths.md').read_text()
  assert '| 0.307M | -0.3100 [-0.3348, -0.2852] | 3 | 0.006, 0.006 | confirmed |' in text
  drawn = [path.name for path in (tmp_path / 'out').glob('*.png')]
  assert drawn == ['lengths.png'] and text.count('](lengths.png)') == 1
  with pytest.raises(errors.InputError, match='two directories of reports or more'):
    in_process.run(lengths, f'--reports={given[0]}', f'--out={tmp_path / "out"}')
  with pytest.raises(errors.InputError, match='no claim was graded at two lengths'):
    in_process.run(lengths, f'--reports={given[0]},{given[2]}', f'--out={tmp_path / "out"}')


def test_runs_at_two_rates_are_no_one_arm(study, tmp_path):
  for rate, seed in ((0.003, 0), (0.006, 1)):
    run = run_of(2.0) | {'step': 100, 'peak_lr': rate}
    results = {name: {seed: run} for name in ('gshard', 'deepseekmoe')}
    one = study._replace(results=results, configs=arm_tests.resolved('tiny', results))
    (tmp_path / str(seed)).mkdir()
    (tmp_path / str(seed) / 'results.csv').write_text(report.csv_text(one))
  with pytest.raises(errors.InputError, match='`gshard` at peak rates 0.003, 0.006 for 100 steps'):
    lengths.read([tmp_path / '0', tmp_path / '1'], 'tiny')
  assert list(lengths.read([tmp_path / '0'], 'tiny')) == [100]


def test_a_claim_of_equality_says_on_which_side_it_fails(study):
  runs = study.results['deepseekmoe']
  study.results['shared_2'] = {s: run_of(run['bits_per_byte'] - 1) for s, run in runs.items()}
  study.configs['shared_2'] = study.configs['deepseekmoe']
  graded = {g.claim.name: g for g in report.grade(study.results, study.configs)}
  words = report.sentence(graded['shared_2 against deepseekmoe: bits_per_byte'])
  assert words.startswith('**Contradicted** (below, not equal')


def test_a_page_in_both_languages(tmp_path):
  blocks = [
    html_report.Heading('A < B', 1),
    html_report.Bullets(['**bold** and `code`']),
    html_report.Table(['a'], [['[to](there)']]),
  ]
  markdown, html = html_report.write(blocks, tmp_path)
  assert (
    markdown.read_text() == '# A < B\n\n- **bold** and `code`\n\n| a |\n| --- |\n| [to](there) |\n'
  )
  text = html.read_text()
  assert '<h1>A &lt; B</h1>' in text and '<strong>bold</strong> and <code>code</code>' in text
  assert '<td><a href="there">to</a></td>' in text


def test_an_embedded_picture_is_small_and_the_same_to_the_eye(tmp_path):
  rng = np.random.default_rng(0)
  pixels = np.full((64, 64, 4), 255, np.uint8)  # one line of many shades on white
  pixels[20, :, :3] = rng.integers(0, 40, (64, 3))
  pixels[40:, :, 3] = 0  # transparent is white on the page
  PIL.Image.fromarray(pixels).save(tmp_path / 'plot.png')
  _, html = html_report.write([html_report.Picture(tmp_path / 'plot.png', 'A')], tmp_path)
  data = base64.b64decode(re.search(r'base64,([^"]+)"', html.read_text())[1])
  assert len(data) < (tmp_path / 'plot.png').stat().st_size
  with PIL.Image.open(io.BytesIO(data)) as image:
    shown = np.asarray(image.convert('RGB')).astype(int)
  assert shown.shape == (64, 64, 3) and (shown[40:] == 255).all()
  assert np.abs(shown[:40] - pixels[:40, :, :3]).max() < 30


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(workdir, the command) of four arms and two seeds on synthetic text."""
  workdir = tmp_path_factory.mktemp('ablation')
  names = ['gshard', 'deepseekmoe', 'upcycled', 'dense']
  # Timed already: without optimisation that would take as long as all the rest.
  (workdir / 'speed.json').write_text(json.dumps(dict.fromkeys(names, 1000.0)))
  command = [sys.executable, '-m', 'experiments.routing_ablation', f'--workdir={workdir}']
  command += [f'--arms={",".join(names)}', '--seeds=2']
  command += ['--steps=21', '--data_source=synthetic']
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  return workdir, command


@pytest.mark.slow
def test_nothing_finished_is_computed_again(finished):
  workdir, command = finished
  results = sorted(workdir.glob('*/*/result.json'))
  assert len(results) == 8
  before = [path.stat().st_mtime_ns for path in results]
  first = (workdir / 'report' / 'report.md').read_text()
  done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  assert 'deepseekmoe against gshard: parameters without routers: equal' in done.stdout
  assert [path.stat().st_mtime_ns for path in results] == before
  assert (workdir / 'report' / 'report.md').read_text() == first
  assert not re.search(r'/(tmp|home|root)/', first)
  kept = json.loads(results[0].read_text())
  assert {'rise_without_shared', 'rise_without_top_experts'} <= set(kept) and kept[measure.SAVED]
  read = measure.read({'gshard': workdir}, [0, 1, 2])
  assert list(read['gshard']) == [0, 1] and measure.column(read, 'gshard', 'max_vio')


@pytest.mark.slow
def test_gates_are_added_up_before_and_after(finished):
  workdir, _ = finished
  read = measure.read(dict.fromkeys(('gshard', 'deepseekmoe', 'dense'), workdir), [0])
  first, second, none = ([read[name][0][key] for key in measure.GATES] for name in read)
  assert first == pytest.approx([1.0, 1.0], abs=1e-6)  # divided by their sum
  assert 7 / 63 < second[0] < 0.3 and second[0] != second[1] < 1.0  # of 63 alike, the largest 7
  assert none == [None, None]
  text = (workdir / 'report' / 'report.md').read_text()
  assert '| 1.00 -> 1.00 |' in text and f'| {second[0]:.2f} -> ' in text


@pytest.mark.slow
def test_a_run_starts_from_the_dense_one_of_its_seed(finished):
  workdir, _ = finished
  losses = {}
  for name in ('dense', 'gshard', 'upcycled'):
    losses[name] = [metric_log.read_metrics(workdir / name / str(seed)) for seed in (0, 1)]
  for seed in (0, 1):  # after the first twenty steps
    anew, ended = losses['gshard'][seed][0]['loss'], losses['dense'][seed][-1]['loss']
    assert losses['upcycled'][seed][0]['loss'] < min(anew, ended) - 0.5


@pytest.mark.slow
def test_other_settings_are_refused(finished):
  _, command = finished
  wrong = [word for word in command if '--steps' not in word] + ['--steps=22']
  done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and 'train.num_steps: 21 -> 22' in done.stderr
