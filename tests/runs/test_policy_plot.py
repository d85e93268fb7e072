import pytest

from moe_jax import errors
from moe_jax.runs import metric_log, plots, policy_plot


def test_the_panels_show_the_log_and_the_held_out_questions(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append((fig, path)))
  keys = metric_log.POLICY_KEYS
  metrics = [
    {'step': step, **{key: step + i / 10 for i, key in enumerate(keys)}} for step in (5, 10)
  ]
  heldout = [{'step': 0, 'right': 1, 'total': 4}, {'step': 10, 'right': 3, 'total': 4}]
  policy_plot.draw(metrics, tmp_path / 'a.png', 'run: rewards', heldout)
  ((fig, path),) = figures
  assert path == tmp_path / 'a.png' and fig.axes[0].get_title(loc='left') == 'run: rewards'
  names = ('reward', 'answer_tokens', 'entropy', 'reference_kl')
  for axes, key in zip(fig.axes, names, strict=True):
    assert axes.lines[0].get_ydata().tolist() == [s + keys.index(key) / 10 for s in (5, 10)]
  held = fig.axes[0].lines[1]
  assert (held.get_xdata().tolist(), held.get_ydata().tolist()) == ([0, 10], [0.25, 0.75])

  # Without a reference there is no distance to show.
  policy_plot.draw([m | {'reference_kl': 0.0} for m in metrics], path, 'run: rewards', heldout)
  assert [axes.get_ylabel().split()[0] for axes in figures[1][0].axes] == [
    'reward,',
    'tokens',
    'entropy',
  ]


def test_answers_kept_are_read_and_damage_is_named(tmp_path):
  assert policy_plot.read_heldout(tmp_path) == []
  path = tmp_path / policy_plot.HELDOUT_FILE
  path.write_text('{"step": 2, "right": 1, "total": 4}\n')
  assert policy_plot.read_heldout(tmp_path) == [{'step': 2, 'right': 1, 'total': 4}]
  for text in ('{"step": 2}\n', 'nonsense\n', '[]\n'):
    path.write_text(text)
    with pytest.raises(errors.InputError, match='answers.jsonl'):
      policy_plot.read_heldout(tmp_path)
