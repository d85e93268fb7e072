"""The end of a run: held-out figures beside gzip and xz, a sample, plots, and what was written."""

import gzip
import json
import lzma
import pathlib
import time

import jax

from moe_jax import atomic_files
from moe_jax.balance import routing_figures
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.inference import generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.processes import agreement
from moe_jax.runs import goodput, metric_log, plots, policy_plot, preference_plot, trained_run
from moe_jax.training import evaluate


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
  """Bits per byte of general compressors on the same bytes, the bar for any model of text."""
  sizes = {
    'gzip -9': len(gzip.compress(text, compresslevel=9, mtime=0)),
    'xz -9': len(lzma.compress(text, preset=9)),
  }
  return {name: 8 * size / len(text) for name, size in sizes.items()}


def sample(
  run: trained_run.Run, prompt: str, max_new_tokens: int, sampling: sampling_lib.Sampling
) -> tuple[str, generate.Generation]:
  """Continues one text prompt: (completion text, the rest about it)."""
  result = generate.generate(
    run.cfg.model,
    run.variables,
    [trained_run.encode_prompt(run, prompt)],
    max_new_tokens,
    run.tokenizer.end_ids,
    sampling,
    decode_text=run.tokenizer.decode,
    timed=True,
  )
  return result.texts[0], result


def draw(
  cfg: schema.Config, workdir: pathlib.Path, step: int, figures: evaluate.Evaluation
) -> list[pathlib.Path]:
  """Draws `plots/loss.png` and, for an MoE model, its routing; returns the paths."""
  written = [workdir / 'plots' / 'loss.png']
  points, title = metric_log.read_metrics(workdir), f'{workdir.name}: training loss'
  if cfg.objective.kind == 'policy':
    plots.loss_curve(points, written[0], title, [], 'policy loss')
    written.append(workdir / 'plots' / 'rewards.png')
    title = f'{workdir.name}: rewards of its answers'
    policy_plot.draw(points, written[-1], title, policy_plot.read_heldout(workdir))
  elif figures.preference is None:
    plots.loss_curve(points, written[0], title, [(step, figures.loss)])
  else:
    heldout = [(step, figures.preference['preference_loss'])]
    plots.loss_curve(points, written[0], title, heldout, 'preference loss [nats per pair]')
    written.append(workdir / 'plots' / 'preferences.png')
    title = f'{workdir.name}: what is preferred'
    preference_plot.draw(points, written[-1], title, figures.preference)
  if figures.routing is None:
    return written
  written.append(workdir / 'plots' / 'expert_load.png')
  title = f'{workdir.name}: expert load on held-out text, step {step}'
  first = cfg.model.num_dense_layers
  plots.expert_load(figures.routing['load'], written[-1], title, first_layer=first)
  written.append(workdir / 'plots' / 'routing.png')
  history = routing_figures.read_history(workdir / 'routing')
  plots.routing_overview(history, written[-1], f'{workdir.name}: routing', first_layer=first)
  written.append(workdir / 'plots' / 'expert_similarity.png')
  title = f'{workdir.name}: how alike the experts are'
  plots.routing_heatmap(history, 'expert_similarity', written[-1], title, first_layer=first)
  if cfg.model.moe.num_virtual_devices > 1:
    written.append(workdir / 'plots' / 'tokens_sent.png')
    title = f'{workdir.name}: tokens sent between virtual devices, held-out text'
    plots.tokens_sent(figures.routing['tokens_sent'].sum(axis=0), written[-1], title)
  return written


def finish(
  run: trained_run.Run, corpus: corpus_lib.Corpus, workdir: pathlib.Path, say: trained_run.Say
) -> evaluate.Evaluation:
  """Evaluates a finished run, samples from it, draws, and says all of it.

  All processes evaluate; the first then writes, while the others wait for it.
  """
  first, began = agreement.is_first(), time.perf_counter()
  figures = evaluate.evaluate(run.cfg, run.variables, corpus, run.mesh, progress=first)
  evaluated = time.perf_counter()
  if first:
    _write(run, corpus, workdir, figures, say)
    spent = {'evaluation': evaluated - began, 'other': time.perf_counter() - evaluated}
    say(goodput.text(goodput.add(workdir, run.step, spent)))
  agreement.wait_for_all()
  return figures


def _write(
  run: trained_run.Run,
  corpus: corpus_lib.Corpus,
  workdir: pathlib.Path,
  figures: evaluate.Evaluation,
  say: trained_run.Say,
):
  text = pipeline.heldout_bytes(corpus, run.cfg.model.max_seq_len)
  baselines = compressed_bits_per_byte(text)
  record = {**figures.as_dict(run.step), 'compressors_bits_per_byte': baselines}
  atomic_files.write_text(workdir / 'evaluation.json', json.dumps(record, indent=2) + '\n')
  if figures.routing is not None:
    heldout = workdir / 'routing' / 'heldout.npz'
    with atomic_files.dispensable(heldout):
      routing_figures.write(heldout, figures.routing)
  written = []
  with atomic_files.dispensable(workdir / 'plots'):
    written = draw(run.cfg, workdir, run.step, figures)
  others = ', '.join(f'{name} {value:.3f}' for name, value in baselines.items())
  say(f'held-out: {figures}')
  say(f'held-out: bits per byte of the same {len(text):,} bytes: {others}')
  train = run.cfg.train
  if train.sample_prompt and train.sample_tokens:
    say(_sample(run, workdir))
  names = ['config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'evaluation.json']
  names += ['routing'] if (workdir / 'routing').is_dir() else []
  say('wrote: ' + ' '.join(str(path) for path in [*(workdir / n for n in names), *written]))


def _sample(run: trained_run.Run, workdir: pathlib.Path) -> str:
  if jax.process_count() > 1:
    again = f'python -m experiments.generate --workdir={workdir}'
    return f'no sample: text is generated by one process alone, {again}'
  train = run.cfg.train
  sampling = sampling_lib.Sampling(temperature=0.8, top_p=0.95, seed=train.seed)
  completion, result = sample(run, train.sample_prompt, train.sample_tokens, sampling)
  return f'sample ({result.tokens_per_second:.0f} tokens/s):\n{train.sample_prompt}{completion}'
