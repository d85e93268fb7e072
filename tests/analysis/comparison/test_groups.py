"""Groups of runs: what makes one, and what it is called."""

import pathlib

import pytest

from moe_jax import errors
from moe_jax.analysis.comparison import groups, workdirs
from tests.analysis.comparison import written


def grouped(paths):
  return groups.group([workdirs.read(path) for path in paths])


def test_seeds_are_recognised_and_names_are_what_directories_share(tmp_path):
  found = grouped(written.two_groups(tmp_path))
  assert [(one.name, list(one.runs)) for one in found] == [
    *(('plain', [0, 1, 2]), ('bias', [0, 1, 2]))
  ]
  assert groups.settings(found) == {'model.moe.expert_bias.update_rule': ['none', 'sign']}


def test_what_decides_no_number_makes_no_group(tmp_path):
  a = written.run(tmp_path / 'a', train__eval_every=5, checkpoint__save_every=7)
  b = written.run(tmp_path / 'b', seed=1, data__prefetch=2, mesh__fsdp=2)
  c = written.run(tmp_path / 'c', train__batch_size=4)
  found = grouped([a, c, b])
  assert [list(one.runs) for one in found] == [[0, 1], [0]]
  assert groups.settings(found) == {'train.batch_size': ['8', '4']}


def test_the_same_run_twice_is_refused(tmp_path):
  a, b = (written.run(tmp_path / name) for name in 'ab')
  with pytest.raises(errors.InputError, match=r'b and .*a have one config and one seed'):
    grouped([a, b])


@pytest.mark.parametrize(
  'paths, want',
  [
    ([['x/gshard/0', 'x/gshard/1'], ['x/fine/0', 'x/fine/1']], ['gshard', 'fine']),
    ([['x/gshard-seed0', 'x/gshard-seed1'], ['x/fine']], ['gshard', 'fine']),
    ([['x/run_10', 'x/run_12'], ['x/run_20', 'x/run_21']], ['run A', 'run B']),
    ([['x/loss_s1', 'x/loss_s2'], ['x/bias1', 'x/bias2']], ['loss', 'bias']),
    ([['x/arm/0'], ['x/arm/1']], ['0', '1']),
    ([['x/arm']], ['arm']),
    ([['x/study/arm/0', 'x/study/arm/1']], ['arm']),
  ],
)
def test_names(paths, want):
  assert groups._names([[pathlib.Path(one) for one in members] for members in paths]) == want
