import types

from moe_jax.runs import fit, loop_actions
from moe_jax.training import loop
from tests import tiny


def test_what_is_due_is_saved_before_an_evaluation_of_the_same_step(monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(loop, 'run', lambda reports, callbacks, **kwargs: seen.extend(callbacks))
  state = types.SimpleNamespace(step=0)
  fit.fit(
    [types.SimpleNamespace(cfg=tiny.make(), workdir=tmp_path)],
    None,
    state,
    (batch for batch in ()),
    mesh=tiny.mesh(),
    put=None,
    checkpointer=types.SimpleNamespace(wait=lambda: None, is_due=lambda step: False),
    meta={},
    stop=types.SimpleNamespace(name='SIGTERM'),
    say=print,
    began=0.0,
  )
  kinds = [type(action) for action in seen]
  save, evaluation = map(kinds.index, (loop_actions.SaveCheckpoint, loop_actions.EvaluateMidway))
  assert kinds[0] == loop_actions.ProgressBar and save < evaluation
  assert seen[evaluation].stop_requested() == 'SIGTERM'
