"""What the routing would cost on several devices."""

import jax
import numpy as np
from matplotlib import figure

from moe_jax.analysis.probes import probe_types
from moe_jax.planning import virtual_devices
from moe_jax.runs import plots


def traffic(context: probe_types.Context) -> probe_types.Finding:
  """What the observed routing would cost on the virtual devices of the config, or on eight."""
  model = context.subject.cfg.model
  devices = model.moe.num_virtual_devices
  devices = devices if devices > 1 else min(8, model.moe.num_experts)
  seen = context.observations
  report = virtual_devices.report(
    seen.expert_idx,
    model.moe.num_experts,
    devices,
    mask=seen.mask,
    capacity_factor=1.0,
    embed_dim=model.embed_dim,
    bytes_per_number=np.dtype(jax.numpy.dtype(model.dtype)).itemsize,
  )
  names = context.layer_names()
  reading = (
    f'On {devices} devices a token needs the experts of '
    f'{probe_types.per_layer(report.mean_devices, names)} devices; the busiest has '
    f'{probe_types.per_layer(report.straggler_factor, names)} times the mean load, and a token '
    f'sends {report.all_to_all_bytes_per_token.sum():,.0f} bytes per forward pass, over all layers.'
  )
  total = report.tokens_sent.sum(axis=0)

  def draw(fig: figure.Figure):
    left, right = fig.subplots(1, 2)
    image = left.imshow(total, cmap='viridis', vmin=0)
    left.set_xlabel('to device')
    left.set_ylabel('home of the token')
    left.set_title('tokens sent, all layers', fontsize=10)
    fig.colorbar(image, ax=left, shrink=0.8)
    right.plot(range(len(names)), report.straggler_factor, 'o-', color=plots.ORANGE)
    right.axhline(1, color='0.6', lw=1)
    right.set_xticks(range(len(names)), [str(context.first_layer + i) for i in range(len(names))])
    right.set_xlabel('layer')
    right.set_title('load of the busiest device / mean', fontsize=10)

  arrays = {
    'tokens_sent': report.tokens_sent,
    'straggler_factor': report.straggler_factor,
    'devices_per_token': report.mean_devices,
    'all_to_all_bytes_per_token': report.all_to_all_bytes_per_token,
  }
  return probe_types.Finding(arrays, reading, draw)
