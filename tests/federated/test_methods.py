from moe_jax.federated import encoders, methods


def test_ablations_leave_one_part_out():
  found = {
    name: (one.extra_head, one.real, one.prototypes) for name, one in methods.METHODS.items()
  }
  assert found['redgrape'] == (True, True, True)
  assert found['no_extra_head'] == (False, True, True)
  assert found['no_real'] == (True, False, True)
  assert found['no_prototypes'] == (True, True, False)
  assert found['head_only'] == (True, False, False)
  assert not methods.METHODS['head_only'].corrects and methods.METHODS['no_real'].corrects
  assert all(not any(found[name]) for name in ('fedavg', 'focal', 'ratio', 'climb', 'creff'))


def test_data_sets_have_encoders_that_there_are():
  assert set(methods.ENCODERS) == set(encoders.ENCODERS)
  assert {one.encoder for one in methods.DATASETS.values()} <= set(methods.ENCODERS)
