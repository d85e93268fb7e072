"""The picture of a mesh, drawn from the shardings that the library gives."""

from collections.abc import Sequence

import jax
import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
from absl import flags

from moe_jax.config import mesh_config
from moe_jax.devices import partitioning

SIZES = {'data': 2, 'expert': 2, 'tensor': 2}
# Shape of one array of each kind, its logical axes, and the axis that the picture names.
ARRAYS = (
  ('rows', 8, ('act_batch', 'act_len')),
  ('experts', 8, ('expert', 'expert_embed', 'gate_up', 'expert_mlp')),
  ('heads', 4, ('heads', 'head_dim', 'embed')),
)
COLORS = ('#cfe8ff', '#ffe0c2')


def make_mesh() -> jax.sharding.Mesh:
  """The mesh of the picture, over eight virtual devices."""
  sizes = dict.fromkeys(mesh_config.AXES, 1) | SIZES
  mesh = mesh_config.MeshConfig(**sizes, stage_micro_batches=0, zero1=False)
  return partitioning.make_mesh(mesh, jax.devices()[:8])


def holdings(mesh: jax.sharding.Mesh) -> list[dict[str, str]]:
  """For each device in the mesh's order: what it holds, as 'rows 0-3'."""
  found = [{} for _ in range(mesh.size)]
  for name, length, axes in ARRAYS:
    with partitioning.activate(mesh):
      sharding = jax.NamedSharding(mesh, jax.P(*partitioning.spec(*axes)))
    shape = (length, *[8] * (len(axes) - 1))
    parts = sharding.devices_indices_map(shape)
    for held, device in zip(found, mesh.devices.flat):
      start, stop, _ = parts[device][0].indices(length)
      held[name] = f'{name} {start}-{stop - 1}'
  return found


def draw(path: str):
  """Writes the picture."""
  mesh = make_mesh()
  figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1.15, 1))
  for i, held in enumerate(holdings(mesh)):
    data, expert, tensor = i // 4, i // 2 % 2, i % 2
    x, y = 1.1 * (2 * expert + tensor) + 0.25 * expert, -1.25 * data
    left.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=COLORS[expert], edgecolor='#333333'))
    left.text(x + 0.5, y + 0.84, f'device {i}', ha='center', va='center', fontweight='bold')
    left.text(x + 0.5, y + 0.42, '\n'.join(held.values()), ha='center', va='center', fontsize=10)
  for data in range(2):
    left.text(-0.12, 0.5 - 1.25 * data, f'data={data}', rotation=90, ha='right', va='center')
  for expert in range(2):
    left.text(1.05 + 2.45 * expert, 1.12, f'expert={expert}', ha='center')
    for tensor in range(2):
      left.text(0.5 + 2.45 * expert + 1.1 * tensor, -1.42, f'tensor={tensor}', ha='center')
  left.set(xlim=(-0.5, 4.8), ylim=(-1.6, 1.4), title='config.mesh: data=2, expert=2, tensor=2')
  left.axis('off')
  split = [(name, ' x '.join(axes)) for name, axes in partitioning.LOGICAL_AXIS_RULES if axes]
  table = right.table(split, colLabels=('logical axis', 'mesh axes that split it'), loc='center')
  table.scale(1, 1.15)
  table.auto_set_column_width((0, 1))
  right.axis('off')
  figure.savefig(path, dpi=110, bbox_inches='tight')
  plt.close(figure)


def main(unused_argv: Sequence[str]):
  """Makes eight virtual devices and draws."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  draw(flags.FLAGS.picture)
  print(f'wrote {flags.FLAGS.picture}')
