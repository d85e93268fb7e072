"""The study's runner: its step is the ordinary one, its points resume, its report is whole."""

import dataclasses
import inspect
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import deepseek_llm_7b
from experiments.scaling_laws import __main__ as command
from experiments.scaling_laws import analyse, figures, phases, report, study, trainer
from moe_jax import errors
from moe_jax.analysis import scaling_power
from moe_jax.config import parse
from moe_jax.data import corpus as corpus_lib
from moe_jax.devices import partitioning
from moe_jax.planning import flops
from moe_jax.training import optimizer_step, train_state
from tests import in_process, tiny

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('quick_processes')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'moe'])
def test_a_step_with_rate_and_batch_as_arguments_is_the_ordinary_one(kind):
  overrides = {} if kind == 'moe' else {'model__moe__num_experts': 0, 'model__num_dense_layers': 0}
  cfg = tiny.make(
    optim__peak_lr=3e-3, optim__schedule='constant', optim__warmup_steps=0,
    train__micro_batch_size=4, **overrides,
  )  # fmt: skip
  mesh, rows = tiny.mesh(1), tiny.batch()
  # Three micro-batches, of which two count.
  padded = {
    key: np.concatenate([a, np.full_like(a[:4], -1 if key == 'targets' else 0)]).reshape(3, 4, -1)
    for key, a in rows.items()
  }
  with partitioning.activate(mesh):
    got, loss = trainer.make_step(cfg, mesh)(
      train_state.init_state(cfg, mesh), padded, np.int32(2), np.float32(3e-3)
    )
    batch = partitioning.put_batch(rows, mesh)
    want, figures = optimizer_step.make_train_step(cfg, mesh)(
      train_state.init_state(cfg, mesh), batch
    )
  assert float(loss) == pytest.approx(float(figures.loss), rel=1e-5)
  tiny.assert_trees_close(got.params, want.params, rtol=1e-2, atol=2e-3)


def test_a_page_whose_steps_may_be_skipped_is_refused():
  with pytest.raises(errors.InputError, match=r'spike_sigma=6\.0 skips steps, and .* skips none'):
    trainer.Trainer(tiny.make(optim__spike_sigma=6.0), None, 8)


def test_model_scale_has_the_papers_table():
  """Table 3 of arXiv 2401.02954: layers, D -> N1, N2, M; vocabulary 102400, 4096 tokens."""
  page = parse.from_dict(deepseek_llm_7b.get_config().to_dict())
  for layers, d, n1, n2, m in (
    (8, 512, 25.2e6, 77.6e6, 352e6),
    (24, 2048, 1.21e9, 1.42e9, 9.66e9),
    (80, 8192, 64.4e9, 65.3e9, 419e9),
  ):
    model = dataclasses.replace(page.model, num_layers=layers, embed_dim=d)
    paper = dataclasses.replace(page.paper, mlp_dim=8 / 3 * d)
    found = flops.model_scale(model, paper)
    assert found.non_embedding == pytest.approx(n1, rel=0.004)
    assert found.complete == pytest.approx(n2, rel=0.004)
    assert found.flops_per_token == pytest.approx(m, rel=0.004)


def test_the_moe_family_activates_what_its_dense_twin_does():
  for dial in (2, 6):
    dense, moe = (study.size(study.page(study.TINY, kind, dial, {})) for kind in study.KINDS)
    assert moe.flops_per_token == pytest.approx(dense.flops_per_token, rel=0.02)
    assert moe.complete == pytest.approx(dense.complete, rel=0.02)


def test_points_spend_their_budget():
  for phase in study.PHASES:
    for kind in study.KINDS:
      for point in study.points(study.TINY, phase, kind, study.PAPER, 64):
        row = study.row(point, study.page(study.TINY, kind, point.dial, {}))
        assert row['compute'] == pytest.approx(point.budget, rel=0.03), point.key


def made_up(point, cfg):
  """A row whose loss follows the paper's allocation, shifted to models of this size."""
  row = study.row(point, cfg)
  best = 2.0 * point.budget**0.45
  best_rate = 0.5 * point.budget**-0.15
  loss = 1 + 30 * point.budget**-0.15 + 0.05 * np.log(row['M'] / best) ** 2
  loss += 0.02 * np.log(point.rate / best_rate) ** 2 + 1e-3 * point.seed
  return row | {'loss': loss, 'bits_per_byte': loss, 'seconds': 1.0}


@pytest.fixture(scope='module')
def rows():
  return [
    made_up(point, study.page(study.TINY, kind, point.dial, {}))
    for phase in study.PHASES
    for kind in study.KINDS
    for point in study.points(study.TINY, phase, kind, study.PAPER, 64)
  ]


def test_report_says_what_the_rows_hold(rows, tmp_path):
  found = analyse.analyse(rows, study.TINY.band)
  allocation = found.measured['dense']['M'].allocation
  assert allocation.optimum.exponent == pytest.approx(0.45, abs=0.03)
  written = report.write(tmp_path, study.TINY, rows)
  assert {path.suffix for path in written} == {'.md', '.csv', '.png'}
  assert all(path.stat().st_size > 0 for path in written)
  text = (tmp_path / 'report.md').read_text()
  assert text.index('## Verdict') < text.index('## IsoFLOP profiles')
  assert 'eta_opt(C): exponent' in text and 'dense, held-out C = 1.28e+12' in text
  drawn = inspect.signature(scaling_power.power).parameters['studies'].default
  assert f' in {round(scaling_power.POWER * drawn)} of {drawn} drawn studies,' in text
  lines = (tmp_path / 'points.csv').read_text().splitlines()
  assert len(lines) == 1 + len(rows)


def test_the_grid_is_read_by_the_mean_of_its_seeds(rows):
  """One lucky seed makes no optimum; a seed that diverged takes its point out."""
  grid = next(iter(study.by_budget(r for r in rows if r['phase'] == 'hyper').values()))
  means = study.seed_means(grid)
  assert len(grid) == study.TINY.seeds * len(means) and study.TINY.seeds > 1
  best = min(means, key=lambda row: row['bits_per_byte'])
  worst = max(means, key=lambda row: row['bits_per_byte'])
  both = [row for row in grid if row['key'].rpartition('_s')[0] == worst['key'][:-3]]
  assert worst['bits_per_byte'] == pytest.approx(np.mean([row['bits_per_byte'] for row in both]))
  lucky = best['bits_per_byte'] - 1e-4
  luck = [row | {'bits_per_byte': lucky} if row is both[0] else row for row in grid]
  near = study.near_optimal_rows(study.seed_means(luck), 1e-3)
  assert worst['key'] not in {row['key'] for row in near}
  lost = [
    row | {'bits_per_byte': float('nan')} if row['key'] == best['key'] else row for row in grid
  ]
  near = study.near_optimal_rows(study.seed_means(lost), study.TINY.band)
  assert near and best['key'] not in {row['key'] for row in near}


def test_scatter_is_pooled_over_points_near_the_best():
  def point(rate, *losses, budget=1.0):
    return [
      {'key': f'{budget} {rate} {i}', 'budget': budget, 'rate': rate, 'batch_tokens': 8}
      | {'bits_per_byte': loss}
      for i, loss in enumerate(losses)
    ]

  # Deviations of 1 % and 2 % with one degree of freedom each: sqrt((2 + 8) / 2) %.
  near = point(0.1, 0.99, 1.01) + point(0.2, 2 * 0.98, 2 * 1.02, budget=2.0)
  far = point(0.4, 1.0, 1.4) + point(0.3, 1.0) + point(0.8, float('nan'), 1.0)
  found, number = analyse.scatter([*near, *far, *near[:2]])  # two of them in both phases
  assert found == pytest.approx(0.01 * np.sqrt(5)) and number == 2
  # The phase `noise` alone, at a point that is not near the best.
  found, number = analyse.scatter([*point(0.1, 1.0), *point(0.2, 1.98, 2.02)])
  assert found == pytest.approx(0.01 * np.sqrt(2)) and number == 1


def test_a_wider_band_takes_more_points_and_is_the_one_that_profiles_follow(rows):
  hyper = analyse.analyse(rows, 0.03).hyper
  assert all(len(grid.near) >= grid.as_paper >= 1 for grid in hyper.grids)
  assert sum(len(grid.near) for grid in hyper.grids) > sum(grid.as_paper for grid in hyper.grids)
  means = study.seed_means(row for row in rows if row['phase'] == 'hyper')
  assert hyper.wide.laws == study.fit_laws(means, 0.03)
  assert hyper.as_paper.laws == study.fit_laws(means, 0.0025) != hyper.wide.laws


def test_where_the_grid_cuts_the_band_off_surfaces_decide(rows):
  """At the middle of all grids: the band. With the best batch at an end: the surfaces."""

  def moved(row, batch):  # a bowl around a rate of 5e-3 and a batch
    away = np.log([row['rate'] / 5e-3, row['batch_tokens'] / batch])
    loss = 2 + 0.05 * float(away @ away) + 1e-4 * row['seed']
    return row | {'loss': loss, 'bits_per_byte': loss}

  def lines(batch):
    made = [moved(row, batch) if row['phase'] in ('hyper', 'noise') else row for row in rows]
    return report.verdict(analyse.analyse(made, study.TINY.band))[:2]

  rate, batch = lines(724)  # between 512 and 1,024
  assert 'through the points within 1 % of the best; ' in rate and 'an end of' not in rate
  assert 'through the points within 1 % of the best; ' in batch and 'an end of' not in batch
  rate, batch = lines(256)
  assert 'through the points within 1 % of the best; ' in rate and 'an end of' not in rate
  assert 'through the minima of surfaces; ' in batch and 'at 5 of 5 budgets' in batch


def test_the_points_of_a_model_are_dealt_out_to_the_jobs():
  points = study.points(study.TINY, 'hyper', 'dense', study.PAPER, 64)
  parts = phases._models(points, 2)
  both = [sorted(p.key for part in parts[i::2] for p in part) for i in range(2)]
  assert sorted(both[0] + both[1]) == sorted(p.key for p in points)
  assert abs(len(both[0]) - len(both[1])) <= len(study.TINY.hyper_dials)
  assert all(len({(p.kind, p.dial) for p in part}) == 1 for part in parts)


def test_a_run_that_diverged_is_no_best_one(rows):
  of_one = list(study.by_budget(r for r in rows if r['phase'] == 'hyper').values())[0]
  diverged = [of_one[0] | {'bits_per_byte': float('nan')}, *of_one[1:]]
  found = analyse._grid(of_one[0]['budget'], diverged, study.TINY.band)
  assert found.best == min(of_one[1:], key=lambda row: row['bits_per_byte']) and found.near


def test_a_published_report_says_the_same_from_its_points(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'draw', lambda *_: [])
  published = ROOT / 'experiments/scaling_laws/results/tiny'
  given = ('--scale=tiny', f'--points={published / "points.csv"}', f'--out={tmp_path}')
  in_process.run(command, *given)
  old, new = (((where / 'report.md').read_text()) for where in (published, tmp_path))
  assert new.split('## How it was made')[0] == old.split('## How it was made')[0]
  power = ('| B_opt, 0.3271 | 1.5 |', 'The fewest seeds per point')
  decides = [line for line in new.splitlines() if line.startswith(power)]
  assert len(decides) == 2
  assert decides == [line for line in old.splitlines() if line.startswith(power)]
  (tmp_path / 'wrong.csv').write_text('a,b\n1,2\n')
  for wrong in ('wrong.csv', 'none.csv'):
    with pytest.raises(errors.InputError, match=f'--points=.*{wrong} '):
      in_process.run(command, '--scale=tiny', f'--points={tmp_path / wrong}')


def run(*arguments):
  command = [sys.executable, '-m', 'experiments.scaling_laws', '--scale=tiny', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_trains_nothing_and_phases_wait_for_the_grid(tmp_path):
  done = run('--dry_run')
  assert done.returncode == 0 and 'hours; the longest point reads' in done.stdout
  done = run(f'--workdir={tmp_path}', '--phases=isoflop')
  assert done.returncode == 2 and 'train these first' in done.stderr
  done = run(f'--workdir={tmp_path}', '--phases=all')
  assert done.returncode == 2 and '--phases=all' in done.stderr


@pytest.mark.slow
def test_a_point_goes_on_where_it_was_stopped(tmp_path):
  """Two starts give the numbers of one; a finished point is a file and leaves nothing else."""
  cfg = study.page(study.TINY, 'moe', 2, {'source': 'synthetic'})
  settings = dataclasses.replace(cfg.checkpoint, save_every=3)
  cache = str(tmp_path / 'cache')
  text = dict(synthetic_documents=200, heldout_fraction=0.1, cache_dir=cache)
  data = dataclasses.replace(cfg.data, **text)
  cfg = dataclasses.replace(cfg, checkpoint=settings, data=data)
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, 0)
  recipe = trainer.Recipe(num_steps=8, rows=8, peak_lr=1e-2, warmup_steps=2, seed=1)
  model = trainer.Trainer(cfg, corpus, 8)

  class Stop:
    name = ''

  whole = model.run(recipe, tmp_path / 'whole', Stop())
  stop = Stop()
  stop.name = 'SIGTERM'
  assert model.run(recipe, tmp_path / 'parts', stop) is None
  again = model.run(recipe, tmp_path / 'parts', Stop())
  assert (again.loss, again.bits_per_byte) == (whole.loss, whole.bits_per_byte)
  assert not (tmp_path / 'parts').exists() and not (tmp_path / 'whole').exists()
  assert json.loads(json.dumps(dataclasses.asdict(again)))['seconds'] > 0
  jax.clear_caches()


def test_a_table_that_lacks_a_phase_or_a_column_is_refused(tmp_path):
  lines = (ROOT / 'experiments/scaling_laws/results/tiny/points.csv').read_text().splitlines()
  table = tmp_path / 'points.csv'
  table.write_text('\n'.join(line for line in lines if not line.startswith('isoflop,moe')))
  with pytest.raises(errors.InputError, match='no points of isoflop of moe, which the report'):
    report.read_points(table)
  table.write_text('\n'.join([lines[0].replace(',seed,', ',sead,'), *lines[1:]]))
  with pytest.raises(errors.InputError, match='has no column seed; name another one'):
    report.read_points(table)
  table.write_text('')
  with pytest.raises(errors.InputError, match='has no column phase, kind'):
    report.read_points(table)


def test_finished_points_are_not_dealt_out(tmp_path, monkeypatch):
  dealt = []
  monkeypatch.setattr(phases.local_jobs, 'run', lambda module, models, *_: dealt.extend(models))
  first, *rest = study.points(study.TINY, 'hyper', 'dense', study.PAPER, 64)
  (tmp_path / 'points').mkdir()
  (tmp_path / 'points' / f'{first.key}.json').write_text('{}')
  given = ('--scale=tiny', '--phases=hyper', '--kinds=dense', f'--workdir={tmp_path}')
  monkeypatch.setattr(phases, '_report', lambda *_: None)
  in_process.run(command, *given)
  assert sorted(p.key for model in dealt for p in model) == sorted(p.key for p in rest)
