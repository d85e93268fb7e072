"""Running several probes on one model, and drawing what they found."""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import tqdm
from matplotlib import figure

from moe_jax.analysis import probes
from moe_jax.analysis.probes import probe_types
from moe_jax.runs import plots


def run(
  context: probe_types.Context, names: Sequence[str], *, progress: bool = False
) -> tuple[dict[str, probe_types.Finding], dict[str, str]]:
  """(findings, reasons of those that do not apply), by the names of probes.

  Args:
    context: the model.
    names: keys of `probes.PROBES`.
    progress: show a bar.
  """
  findings, skipped = {}, {}
  for name in tqdm.tqdm(names, desc='probes', unit='probe', disable=None if progress else True):
    try:
      findings[name] = probes.PROBES[name](context)
    except probe_types.NotApplicableError as reason:
      skipped[name] = str(reason)
  return findings, skipped


def draw(
  findings: Mapping[str, probe_types.Finding], directory: pathlib.Path
) -> dict[str, pathlib.Path]:
  """Writes a PNG per finding; returns their paths."""
  paths = {}
  for name, one in findings.items():
    with matplotlib.rc_context(plots.STYLE):
      fig = figure.Figure(figsize=one.size, layout='constrained')
      one.draw(fig)
      paths[name] = directory / f'{name}.png'
      plots.save(fig, paths[name])
  return paths
