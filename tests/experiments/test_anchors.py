from experiments.anchors import claims, report


def test_a_model_at_chance_confirms_nothing():
  """Flow and loyalties of a model that ignores its demonstrations can look like anchors."""
  flow = {'wp': [[0.9, 0.1]] * 4, 'pq': [[0.1, 0.9]] * 4, 'ww': [[0.0, 0.0]] * 4}
  record = {'accuracy': [0.9, 0.8, 1.0], 'chance': 0.25, 'flow': {'abs_of_sum': flow}}
  lines = report.lines(record)
  assert lines[0].endswith('chance 0.250') and len(lines) == 3
  assert all(line.endswith('+0.800 [+0.800, +0.800], confirmed') for line in lines[1:])
  at_chance = report.lines(record | {'accuracy': [0.2, 0.3, 0.4]})
  assert all(line.endswith('not judged: accuracy is not above chance') for line in at_chance[1:])
  assert not claims.learns([1.0], 0.25)  # a single value has no interval
