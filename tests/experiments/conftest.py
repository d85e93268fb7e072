"""What tests of several files share: the routing ablation without its training."""

import json

import pytest

from experiments.routing_ablation import __main__ as ablation
from experiments.routing_ablation import arms, measure, pictures
from experiments.routing_ablation import study as study_lib
from moe_jax.config import parse
from moe_jax.runs import seeds
from tests import in_process


@pytest.fixture
def study(tmp_path, monkeypatch):
  """Calls the ablation with a training that writes figures at once; returns what was trained."""
  trained = []

  def train(unit, unused_page):
    seed = unit.seeds[0]
    trained.append((unit.arm, unit.cfg.optim.peak_lr, seed))
    if unit.arm in broken:
      raise broken[unit.arm]
    where = unit.workdir / unit.arm / str(seed)
    where.mkdir(parents=True, exist_ok=True)
    (cfg,) = seeds.configs(unit.cfg, [seed])
    (where / 'config.json').write_text(json.dumps({'config': parse.to_dict(cfg)}))
    rate = cfg.optim.peak_lr
    figures = {arms.BITS: 2.0 + abs(rate - 0.012) + 0.1 * seed, 'peak_lr': rate}
    figures['step'] = cfg.train.num_steps
    (where / 'result.json').write_text(json.dumps(figures))

  def read(workdirs, seeds):
    found = {}
    for name, workdir in workdirs.items():
      done = {seed: measure.path(workdir, name, seed) for seed in seeds}
      found[name] = {
        seed: {
          **json.loads(path.read_text()),
          **{'loss': 3.0, 'max_vio': 0.1, 'train_drop_rate': 0.0},
          **{'seconds': 60.0, 'commit': 'c'},
          'curve': {'step': [1, 2], 'loss': [3.0, 2.0], 'max_vio': [1, 1], 'drop_rate': [0, 0]},
        }
        for seed, path in done.items()
        if path.exists()
      }
    return found

  broken = {}
  monkeypatch.setattr(study_lib, '_train', train)
  monkeypatch.setattr(measure, 'read', read)
  monkeypatch.setattr(
    measure, 'finished', lambda workdir, arm, seed: measure.path(workdir, arm, seed).exists()
  )
  monkeypatch.setattr(measure, 'rates', lambda _, configs, known: dict.fromkeys(configs, 1.0))
  monkeypatch.setattr(pictures, 'draw', lambda *_: [])  # test_routing_ablation.py draws them

  def call(*words, failing=None):
    trained.clear()
    broken.clear()
    broken.update(failing or {})
    in_process.run(ablation, f'--workdir={tmp_path}', '--together=1', *words)
    return list(trained)

  return call
