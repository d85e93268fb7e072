"""Groups of runs: what makes one, and what it is called."""

import pathlib

import pytest

from moe_jax import errors
from moe_jax.analysis.comparison import comparison, groups, workdirs
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


def test_an_upcycled_run_is_no_run_that_began_anew(tmp_path):
  def made(seed, step):
    made_of = {'from': f'runs/dense/{seed}', 'step': step, 'noise': 0.0}
    return written.run(tmp_path / f'from{step}_s{seed}', seed=seed, upcycled=made_of)

  anew = [written.run(tmp_path / f'anew{seed}', seed=seed) for seed in (0, 1)]
  paths = [*anew, made(0, 8), made(1, 8), made(0, 16)]
  found = grouped(paths)
  assert [list(one.runs) for one in found] == [[0, 1], [0, 1], [0]]
  assert groups.settings(found) == {
    'upcycled.step': ['-', '8', '16'],
    'upcycled.noise': ['-', '0', '0'],
  }
  said = comparison.compare(paths).remarks()
  assert said[0] == 'from8: upcycled from a dense run of 8 steps, which no budget counts'


def test_starts_that_differ_by_the_seed_alone_are_one(tmp_path):
  def tuned(name, seed, start, **more):
    return written.run(tmp_path / f'{name}_s{seed}', seed=seed, init_from=start, **more)

  paths = [tuned('all', seed, f'runs/base{seed}') for seed in (0, 1, 10)]
  paths += [tuned('few', s, f'runs/base{s}', optim__peak_lr=0.1) for s in (0, 1)]
  found = grouped(paths)
  assert [(one.name, list(one.runs)) for one in found] == [('all', [0, 1, 10]), ('few', [0, 1])]
  assert list(groups.settings(found)) == ['optim.peak_lr']
  # One base of all seeds is another start, though its name ends with one of them; so is base10.
  paths = [tuned('one', seed, 'runs/base0') for seed in (0, 1)]
  found = grouped([*paths, tuned('other', 2, 'runs/base2'), tuned('far', 0, 'runs/base10')])
  assert [list(one.runs) for one in found] == [[0, 1], [2], [0]]
  assert groups.settings(found) == {'init_from': ['runs/base0', 'runs/base2', 'runs/base10']}
  assert len(grouped([tuned('ten', 0, 'runs/base10'), tuned('ten', 1, 'runs/base11')])) == 2


def test_many_groups_of_one_name_are_told_apart():
  paths = [[pathlib.Path(f'x/run_{n}0'), pathlib.Path(f'x/run_{n}1')] for n in range(60)]
  names = groups._names(paths)
  assert len(set(names)) == 60
  assert names[0] == 'run A' and names[25:28] == ['run Z', 'run AA', 'run AB']
  assert names[51:53] == ['run AZ', 'run BA']


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
