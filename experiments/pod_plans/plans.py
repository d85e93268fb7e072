"""The rows that are planned, and the tables of their plans."""

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from moe_jax import errors
from moe_jax.config import pages, parse
from moe_jax.planning import chips, planner

HERE = pathlib.Path(__file__).parent
GIB = 2**30
BEGIN, END = '<!-- {name}: written by the command -->', '<!-- end of {name} -->'
MAX_VIO = 1.0  # buffers hold twice the mean, and the busiest device computes as much


@dataclasses.dataclass(frozen=True)
class Row:
  """One plan; a step is `passes` forward passes over `micro` rows of 4096 tokens."""

  page: str
  topology: str
  mesh: str
  micro: int
  passes: int = 4
  remat: str = 'full'
  moments: str = 'float32'
  loss_chunk: int = 4096
  layers: int = 0  # 0 = the page's

  @property
  def name(self) -> str:
    return f'{self.page} {self.topology} {self.layers or "all"}'


ROWS = (
  Row('deepseekmoe_16b', 'v5e:4x8', 'fsdp=32', 32, 1, loss_chunk=1024),
  Row('deepseekmoe_16b', 'v5p:2x2x2', 'fsdp=8', 32),
  Row('deepseekmoe_16b', 'v6e:4x4', 'fsdp=16', 32),
  Row('deepseek_v2_lite', 'v5e:4x8', 'fsdp=32', 32, 1, loss_chunk=1024),
  Row('deepseek_v2_lite', 'v5p:2x2x2', 'fsdp=8', 32),
  Row('deepseek_v2_lite', 'v6e:4x4', 'fsdp=16', 32),
  Row(
    *('deepseek_v2', 'v5e:16x16*2', 'dcn_fsdp=2,fsdp=16,expert=4,tensor=4', 128, 1),
    moments='bfloat16',
    loss_chunk=512,
  ),
  Row('deepseek_v2', 'v5p:4x8x8', 'fsdp=32,expert=8', 256),
  Row(
    *('deepseek_v2', 'v6e:16x16', 'fsdp=32,expert=8', 256, 1),
    moments='bfloat16',
    loss_chunk=1024,
  ),
  Row(
    *('deepseek_v3', 'v5e:16x16*8', 'dcn_fsdp=8,fsdp=16,expert=2,tensor=8', 256, 1),
    remat='offload',
    moments='bfloat16',
    loss_chunk=512,
  ),
  Row('deepseek_v3', 'v5p:8x8x8', 'fsdp=64,expert=8', 512),
  Row(
    *('deepseek_v3', 'v6e:16x16*4', 'dcn_fsdp=4,fsdp=16,expert=8,tensor=2', 512, 1),
    remat='offload',
    moments='bfloat16',
    loss_chunk=1024,
  ),
)
# The step of V2 on v5p at half its depth, too.
SHALLOW = Row('deepseek_v2', 'v5p:4x8x8', 'fsdp=32,expert=8', 256, layers=30)


def request(row: Row, estimate: bool) -> planner.Request:
  """What a row asks for."""
  page = pages.values(row.page)
  page.train.batch_ramp = ()
  page.train.batch_size = row.passes * row.micro
  page.train.micro_batch_size = row.micro
  page.train.loss_chunk = row.loss_chunk
  page.model.remat = row.remat
  page.optim.moment_dtype = row.moments
  page.mesh.update(parse.mesh_values(row.mesh))
  if row.layers:
    page.model.num_layers = row.layers
  cfg = parse.from_dict(page.to_dict())
  topology = chips.parse(row.topology)
  return planner.Request(cfg, topology, max_vio=MAX_VIO, estimate=estimate)


def found(row: Row, estimate: bool) -> dict[str, Any]:
  """The plan of a row as JSON, or why there is none."""
  entry = dataclasses.asdict(row) | {'name': row.name}
  try:
    plan = planner.plan(request(row, estimate), progress=True)
  except errors.InputError as error:
    return entry | {'refused': str(error)}
  return entry | {'plan': plan.to_json()}


def line(entry: dict[str, Any]) -> str:
  """A row of the table."""
  if 'refused' in entry:
    return f'| {entry["page"]} | {entry["topology"]} | {entry["mesh"]} | {entry["refused"]} |'
  plan = entry['plan']
  memory = plan['breakdown']
  state = memory['parameters'] + memory['optimizer_state']
  cells = [
    *(entry['page'], entry['topology'], entry['mesh']),
    f'{entry["passes"]} x {entry["micro"]}, {entry["remat"]}, {entry["moments"]}',
    f'{state / GIB:.1f}',
    f'{plan["hbm_bytes"] / GIB:.1f} of {plan["hbm_capacity_bytes"] / GIB:.1f}',
    'yes' if plan['fits'] else '**no**',
    *(f'{plan["seconds"].get(name, 0):.2f}' for name in ('compute', 'hbm', 'ici', 'dcn')),
    plan['bound_by'],
    f'{100 * plan["mfu_bound"]:.0f} %',
    f'{plan["compile_seconds"]:.0f}',
    f'{plan["host_memory_bytes"] / GIB:.1f}',
  ]
  return f'| {" | ".join(cells)} |'


HEADER = (
  '| model | topology | mesh | rows, remat, moments | state | needed, GiB | fits | compute s '
  '| HBM s | ICI s | DCN s | bound by | MFU at most | compile s | host GiB |'
)


def table(entries: Sequence[dict[str, Any]]) -> str:
  """All rows in Markdown."""
  return '\n'.join([HEADER, '|' + ' --- |' * (HEADER.count('|') - 1), *map(line, entries)])


def known() -> dict[str, dict[str, Any]]:
  """The rows of results.json by name, of those that are still asked for."""
  path = HERE / 'results.json'
  rows = json.loads(path.read_text(encoding='utf-8'))['rows'] if path.exists() else []
  names = {row.name for row in (*ROWS, SHALLOW)}
  return {entry['name']: entry for entry in rows if entry['name'] in names}


def write(entries: dict[str, dict[str, Any]]):
  """results.json, and the README's tables; rows in the order of ROWS."""
  order = [row.name for row in (*ROWS, SHALLOW) if row.name in entries]
  machine = f'{os.cpu_count()} CPU cores, Python {platform.python_version()}, JAX {jax.__version__}'
  rows = [entries[name] for name in order]
  values = {'machine': machine, 'max_vio': MAX_VIO, 'rows': rows}
  (HERE / 'results.json').write_text(json.dumps(values, indent=1) + '\n', encoding='utf-8')
  readme = HERE / 'README.md'
  text = readme.read_text(encoding='utf-8')
  plans = [entry for entry in rows if not entry['layers']]
  for name, body in (('table', table(plans)), ('depths', depth_table(rows))):
    begin, end = BEGIN.format(name=name), END.format(name=name)
    before, _, rest = text.partition(begin)
    text = f'{before}{begin}\n\n{body}\n\n{end}{rest.partition(end)[2]}'
  readme.write_text(text, encoding='utf-8')


def depth_table(entries: Sequence[dict[str, Any]]) -> str:
  """Compile time of one model at two depths."""
  lines = ['| layers | compile s | CPU s | host GiB |', '| --- | --- | --- | --- |']
  for entry in entries:
    if (entry['page'], entry['topology']) == (SHALLOW.page, SHALLOW.topology) and 'plan' in entry:
      plan = entry['plan']
      lines.append(
        f'| {entry["layers"] or "all"} | {plan["compile_seconds"]:.0f} | '
        f'{plan["compile_cpu_seconds"]:.0f} | {plan["host_memory_bytes"] / GIB:.2f} |'
      )
  return '\n'.join(lines)


def main(argv: Sequence[str]):
  """Plans every row, and writes what is known after each."""
  del argv
  jax.config.update('jax_platforms', 'cpu')
  args = flags.FLAGS
  words = [word for word in args.only.split(',') if word]
  entries = known()
  for row in (*ROWS, SHALLOW):
    if all(word in row.name for word in words):
      entries[row.name] = found(row, args.estimate)
      print(line(entries[row.name]), flush=True)
      if not args.estimate:
        write(entries)
