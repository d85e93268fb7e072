import pytest

from moe_jax.runs import metric_log, plots, preference_plot


def test_the_panels_show_the_figures_of_log_and_held_out_split(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append((fig, path)))
  metrics = [
    {'step': step, **{key: step + i / 10 for i, key in enumerate(metric_log.PREFERENCE_KEYS)}}
    for step in (5, 10)
  ]
  heldout = dict.fromkeys(metric_log.PREFERENCE_KEYS, 0.25)
  preference_plot.draw(metrics, tmp_path / 'a.png', 'run: pairs', heldout)
  ((fig, path),) = figures
  assert path == tmp_path / 'a.png'
  rewards, accuracy, distance = fig.axes
  assert rewards.get_title(loc='left') == 'run: pairs'
  keys = metric_log.PREFERENCE_KEYS
  for axes, line, key in (
    (rewards, 0, 'chosen_reward'),
    (rewards, 2, 'rejected_reward'),
    (accuracy, 0, 'preference_accuracy'),
    (distance, 0, 'reference_kl'),
  ):
    drawn, held = axes.lines[line : line + 2]
    assert drawn.get_xdata().tolist() == [5, 10]
    want = [step + keys.index(key) / 10 for step in (5, 10)]
    assert drawn.get_ydata().tolist() == pytest.approx(want)
    assert (held.get_xdata(), held.get_ydata()) == ([10], [0.25])
  assert accuracy.get_ylim()[0] == 0 and accuracy.get_ylim()[1] > 1
