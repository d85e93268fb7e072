"""The tables of AT_SCALE.md; every row is a plan from shapes."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from experiments.pod_plans import plans
from moe_jax import errors
from moe_jax.config import pages, parse
from moe_jax.planning import chips, failures, flops, pipeline, planner, planner_search, run_cost
from moe_jax.planning import estimate as estimate_lib

HERE = pathlib.Path(__file__).parent
GIB = 2**30
MAX_VIO = 0.5  # the busiest device has one and a half times the mean load, and buffers hold as much
TRILLION = 1e12

BEST = (
  *(('deepseek_v2_lite', name) for name in ('v5p:4x4x4', 'v6e:8x8', 'h200:64')),
  *(('deepseek_v2', name) for name in ('v5p:8x8x8', 'v6e:16x16', 'h200:512')),
  *(('deepseek_v3', name) for name in ('v5p:8x8x16', 'v5p:8x16x16', 'v6e:16x16*4', 'h200:2048')),
  *(('deepseek_llm_67b', name) for name in ('v5p:8x8x8', 'v6e:16x16', 'h200:512')),
)
CHIPS = (512, 1024, 2048, 4096, 10_000)
MTBF_HOURS, RESTART_SECONDS, CHECKPOINT_SECONDS = 50_000, 600, (10, 60, 300)
SLICES = ('v5p:8x16x16', 'v5p:8x8x8*4', 'v5p:8x8x8*8', 'v6e:16x16*8', 'v6e:16x16*16')
LENGTHS = tuple(
  (page, name)
  for name in ('v5p:8x8x16', 'v5p:8x16x16')
  for page in ('deepseek_v3', 'deepseek_v3:long_32k', 'deepseek_v3:long_128k')
)
PIPELINES = ('v5p:8x16x16', 'v5p:8x8x8*4', 'h200:2048')
STAGES = (2, 4, 8, 16)

Rows = list[dict[str, Any]]


def request(page_name: str, topology: str) -> planner.Request:
  """A page on a topology as it is trained at scale: ZeRO-1 wherever weights are whole."""
  page = pages.values(page_name)
  page.train.batch_ramp = ()
  page.mesh.zero1 = True
  place = chips.parse(topology)
  if place.chip.kind == 'gpu':
    # Between nodes the gather that `auto` takes within one would send every token everywhere.
    page.model.moe.exchange.kind = 'ragged_all_to_all'
  cfg = parse.from_dict(page.to_dict())
  return planner.Request(cfg, place, max_vio=MAX_VIO if cfg.model.is_moe else None, estimate=True)


def found(asked: planner.Request) -> planner.Plan | None:
  """The best plan; None if no mesh divides the sizes and fits."""
  try:
    return planner_search.search(asked, 1)[0][0]
  except errors.InputError:
    return None


def _plan_row(page: str, topology: str) -> dict[str, Any]:
  asked = request(page, topology)
  plan = found(asked)
  row: dict[str, Any] = {'page': page, 'topology': topology}
  if plan is None:
    return row
  cost = run_cost.run_cost(asked.topology, plan, tokens=TRILLION)
  row |= {'plan': plan.to_json(), 'cost': dataclasses.asdict(cost)}
  model = dataclasses.replace(asked.cfg.model, remat='none')
  work = estimate_lib.work(dataclasses.replace(asked.cfg, model=model))
  cache = flops.kv_cache_elements_per_token(model) * model.max_seq_len * 2
  return row | {'attention_share': work.attention / work.model, 'cache_bytes': cache}


def best() -> Rows:
  """The fastest mesh that fits of every model and topology."""
  return [_plan_row(page, topology) for page, topology in BEST]


def goodput() -> Rows:
  """Time that is lost, by chips and seconds per checkpoint."""
  rows = []
  for count in CHIPS:
    for seconds in CHECKPOINT_SECONDS:
      stated = failures.Failures(MTBF_HOURS, seconds, RESTART_SECONDS)
      lost = dataclasses.asdict(failures.goodput(stated, count))
      rows.append(lost | {'checkpoint_seconds': seconds})
  return rows


def slices() -> Rows:
  """V3 on one and several slices."""
  return [_plan_row('deepseek_v3', topology) for topology in SLICES]


def lengths() -> Rows:
  """V3's three stages."""
  return [_plan_row(page, topology) for page, topology in LENGTHS]


def pipelines() -> Rows:
  """V3 in stages, against the best mesh without them."""
  rows = []
  for topology in PIPELINES:
    asked = request('deepseek_v3', topology)
    plan = found(asked)
    assert plan is not None, f'V3 fits no mesh of {topology}'
    alone = {'bound': plan.step_seconds_bound, 'one_by_one': sum(plan.seconds.values())}
    for stages in STAGES:
      for one in pipeline.best(asked, stages):
        rows.append({'topology': topology, 'without': alone, **dataclasses.asdict(one)})
  return rows


TABLES = {
  'best': best,
  'goodput': goodput,
  'slices': slices,
  'lengths': lengths,
  'pipelines': pipelines,
}
HEADS = {
  'best': 'model | topology | mesh | rows at a time, remat | GiB needed | GiB left | step s | '
  'bound by | MFU at most | chip-hours per 1T tokens, at least',
  'goodput': 'chips | a failure every, h | checkpoint s | save every, s | lost to checkpoints | '
  'lost to failures | goodput',
  'slices': 'topology | chips | mesh | GiB left | compute s | HBM s | ICI s | DCN s | step s | '
  'bound by | MFU at most',
  'lengths': 'tokens of a row | topology | mesh | remat | attention of the FLOPs | '
  'activations GiB | GiB left | cache of a row GiB | step s | bound by | MFU at most',
  'pipelines': 'topology | stages | schedule | mesh of a stage | micro-batches | GiB | bubble | '
  'sent GB | step s | of the best without | nothing overlaps, s | of the best without',
}


def _mesh(mesh: dict[str, int]) -> str:
  return ','.join(f'{axis}={size}' for axis, size in mesh.items())


def _percent(share: float) -> str:
  return f'{100 * share:.1f} %'


def _end(plan: dict[str, Any]) -> tuple[str, ...]:
  step = f'{plan["step_seconds_bound"]:.1f}'
  return step, plan['bound_by'], f'{100 * plan["mfu_bound"]:.0f} %'


def _left(plan: dict[str, Any]) -> str:
  return f'{(plan["hbm_capacity_bytes"] - plan["hbm_bytes"]) / GIB:.1f}'


def _best_cells(row: dict[str, Any]) -> tuple[str, ...]:
  plan = row['plan']
  hours = row['cost']['chip_hours_per_trillion_tokens']
  rows = f'{plan["micro_batch_size"]}, {plan["remat"]}'
  needed = f'{plan["hbm_bytes"] / GIB:.1f}'
  head = (row['page'], row['topology'], _mesh(plan['mesh']), rows, needed, _left(plan))
  return (*head, *_end(plan), f'{hours:,.0f}')


def _goodput_cells(row: dict[str, Any]) -> tuple[str, ...]:
  shares = (_percent(row[name]) for name in ('checkpoints', 'failures', 'goodput'))
  every, save = f'{row["mtbf_seconds"] / 3600:.1f}', f'{row["interval_seconds"]:,.0f}'
  return f'{row["num_chips"]:,}', every, str(row['checkpoint_seconds']), save, *shares


def _slices_cells(row: dict[str, Any]) -> tuple[str, ...]:
  plan = row['plan']
  seconds = (f'{plan["seconds"][name]:.1f}' for name in ('compute', 'hbm', 'ici', 'dcn'))
  count = str(row['cost']['num_chips'])
  return row['topology'], count, _mesh(plan['mesh']), _left(plan), *seconds, *_end(plan)


def _lengths_cells(row: dict[str, Any]) -> tuple[str, ...]:
  plan = row['plan']
  tokens = {'': '4K', 'long_32k': '32K', 'long_128k': '128K'}[row['page'].partition(':')[2]]
  kept = plan['breakdown']['activations kept for the backward pass'] / GIB
  share, cache = _percent(row['attention_share']), f'{row["cache_bytes"] / GIB:.2f}'
  head = (tokens, row['topology'], _mesh(plan['mesh']), plan['remat'], share, f'{kept:.1f}')
  return (*head, _left(plan), cache, *_end(plan))


def _pipelines_cells(row: dict[str, Any]) -> tuple[str, ...]:
  bound, serial = row['step_seconds_bound'], row['step_seconds_one_by_one']
  mesh = f'{_mesh(row["mesh"])}; {row["remat"]}'
  memory, sent = f'{row["hbm_bytes"] / GIB:.0f}', f'{row["sent_bytes"] / 1e9:.0f}'
  micros, passes = str(row['micro_batches']), row['passes']
  micros += f' in {passes} passes' if passes > 1 else ''
  head = (row['topology'], str(row['stages']), row['schedule'], mesh, micros)
  of = (f'{bound / row["without"]["bound"]:.2f}', f'{serial / row["without"]["one_by_one"]:.2f}')
  share = _percent(row['bubble_share'])
  return (*head, memory, share, sent, f'{bound:.1f}', of[0], f'{serial:.1f}', of[1])


CELLS = {
  'best': _best_cells,
  'goodput': _goodput_cells,
  'slices': _slices_cells,
  'lengths': _lengths_cells,
  'pipelines': _pipelines_cells,
}


def table(name: str, rows: Rows) -> str:
  """A table in Markdown; rows for which nothing fits say so."""
  head = HEADS[name]
  return '\n'.join([f'| {head} |', '|' + ' --- |' * (head.count('|') + 1), *_lines(name, rows)])


def _lines(name: str, rows: Rows) -> Iterator[str]:
  for row in rows:
    unfit = 'page' in row and 'plan' not in row
    cells = (row['page'], row['topology'], 'nothing fits') if unfit else CELLS[name](row)
    yield f'| {" | ".join(cells)} |'


def write(name: str, rows: Rows):
  """The table in AT_SCALE.md and its figures in at_scale.json."""
  figures = HERE / 'at_scale.json'
  known = json.loads(figures.read_text(encoding='utf-8')) if figures.exists() else {}
  values = {'max_vio': MAX_VIO} | known | {name: rows}
  figures.write_text(json.dumps(values, indent=1) + '\n', encoding='utf-8')
  page = HERE / 'AT_SCALE.md'
  text = page.read_text(encoding='utf-8')
  begin, end = plans.BEGIN.format(name=name), plans.END.format(name=name)
  before, _, rest = text.partition(begin)
  text = f'{before}{begin}\n\n{table(name, rows)}\n\n{end}{rest.partition(end)[2]}'
  page.write_text(text, encoding='utf-8')


def main(argv: Sequence[str]):
  """Makes the tables, and writes each when it is done."""
  del argv
  jax.config.update('jax_platforms', 'cpu')
  only = flags.FLAGS.only
  unknown = [name for name in only if name not in TABLES]
  errors.require(
    not unknown, f'--only={",".join(unknown)} names no table; choose from {", ".join(TABLES)}'
  )
  for name, make in TABLES.items():
    if name in only or not only:
      rows = make()
      write(name, rows)
      print(table(name, rows), flush=True)
