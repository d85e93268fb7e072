import json

import jax
import numpy as np
import pytest

from configs import smoke
from experiments.common import package_functions
from experiments.topology import bridge, weighted_tuning
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.graphs import structs
from moe_jax.runs import train_run
from tests import in_process


def test_functions_of_packages_do_not_name_them():
  found = package_functions.read(('asyncio', 'logging'), per_package=20)
  assert [one.package for one in found] == [0] * 20 + [1] * 20
  assert len({one.text for one in found}) == 40
  assert all(('asyncio', 'logging')[one.package] not in one.text.lower() for one in found)
  assert found == package_functions.read(('asyncio', 'logging'), per_package=20)
  for packages, words in ((('json',), 'package json has'), (('no_such',), 'no package')):
    with pytest.raises(errors.InputError, match=words):
      package_functions.read(packages)


def test_labels_are_as_many_of_each_class_and_those_of_the_seed():
  classes = np.repeat([0, 1, 2], [5, 9, 7])
  first, again, other = (weighted_tuning.labelled(classes, 4, seed) for seed in (1, 1, 2))
  assert np.array_equal(np.bincount(classes[first]), [4, 4, 4])
  assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_weights_of_a_chain_of_two_classes():
  """Labelled nodes at the border of two classes weigh least, those far from it most."""
  num = 12
  graph = structs.undirected([(i, i + 1) for i in range(num - 1)], num)
  classes = np.repeat([0, 1], num // 2)
  train = np.isin(np.arange(num), [1, 3, 5, 6, 8, 10])
  weights = {
    arm: weighted_tuning.weights_of(graph, classes, train, arm) for arm in weighted_tuning.ARMS
  }
  assert np.array_equal(weights['uniform'], train)
  for arm in ('renode', 'renode_within'):
    found = weights[arm]
    assert not found[~train].any() and found[train].mean() == pytest.approx(1, abs=1e-5)
    assert found[1] > found[3] > found[5] and found[10] > found[8] > found[6]
  # What is not labelled is not looked at.
  hidden = np.where(train, classes, 1 - classes)
  assert np.array_equal(
    weighted_tuning.weights_of(graph, hidden, train, 'renode'), weights['renode']
  )


def test_macro_f1_by_hand():
  names = package_functions.PACKAGES
  classes = np.array([0, 0, 0, 1, 1])
  told = [names[0], f' {names[0]}', names[1], names[1], 'nothing']
  # Package 0: 2 of 2 said and of 3 there; package 1: 1 of 2 said and of 2 there.
  assert weighted_tuning.macro_f1(classes, told) == pytest.approx((4 / 5 + 2 / 4) / 2)


def test_the_table_pairs_seeds_and_results_of_other_settings_are_refused(tmp_path):
  results = {
    f'{arm}/{seed}': {'accuracy': base + seed / 10, 'macro_f1': base, 'class_weights': [0.5, 1.5]}
    for arm, base in zip(weighted_tuning.ARMS, (0.4, 0.5, 0.4))
    for seed in (0, 1, 2)
  }
  rows = weighted_tuning.table([0, 1, 2], results).split('\n')
  assert rows[2].startswith('| uniform | 50.0 |  | 40.0 |  | 0.50, 1.50 |')
  assert rows[3].startswith('| renode | 60.0 | +10.0 [+10.0, +10.0] | 50.0 |')
  path = tmp_path / 'result.json'
  path.write_text(json.dumps({'accuracy': 1.0, 'settings': {'steps': 3}}))
  assert weighted_tuning._read(path, {'steps': 3}) == {'accuracy': 1.0}
  with pytest.raises(errors.InputError, match='of other settings'):
    weighted_tuning._read(path, {'steps': 4})


@pytest.mark.parametrize(
  'flag, words', [('--labels=100', 'below --per_package=100'), ('--steps=0', 'at least 1')]
)
def test_bad_flags_are_refused_before_anything_is_read(tmp_path, flag, words):
  with pytest.raises(errors.InputError, match=words):
    in_process.run(bridge, '--base=nowhere', f'--workdir={tmp_path}', flag)


@pytest.mark.slow
@pytest.mark.long
def test_every_arm_is_tuned_and_measured_and_nothing_twice(tmp_path, capsys, monkeypatch):
  make_mesh = partitioning.make_mesh
  monkeypatch.setattr(partitioning, 'make_mesh', lambda cfg: make_mesh(cfg, jax.devices()[:1]))
  page = smoke.get_config()
  page.update_from_flattened_dict(
    {
      'data.cache_dir': str(tmp_path / 'cache'),
      'data.synthetic_documents': 60,
      'model.max_seq_len': 512,
      'model.num_layers': 2,
      'optim.warmup_steps': 0,
      'train.num_steps': 1,
      'train.batch_size': 2,
      'train.sample_prompt': '',
    }
  )
  train_run.run_training(parse.from_dict(page.to_dict()), tmp_path / 'base', say=lambda line: None)
  out = tmp_path / 'out'
  arguments = (
    f'--base={tmp_path / "base"}', f'--workdir={tmp_path / "bridge"}', f'--out={out}',
    '--seeds=0,1', '--steps=1', '--per_package=4', '--labels=2', '--neighbors=2',
  )  # fmt: skip
  in_process.run(bridge, *arguments)
  capsys.readouterr()
  record = json.loads((out / 'bridge.json').read_text())
  assert len(record['runs']) == 6 and record['settings']['functions'] == 32
  assert all(one['heldout'] == 16 for one in record['runs'].values())
  lines = (tmp_path / 'bridge' / 'renode-0' / 'train.jsonl').read_text().splitlines()
  assert len(lines) == 4 * 16  # four copies of each labelled function, on average
  (out / 'README.md').unlink()
  in_process.run(bridge, *arguments)  # from the files alone
  assert '| renode |' in (out / 'README.md').read_text()
