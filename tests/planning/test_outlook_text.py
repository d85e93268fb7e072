from moe_jax.planning import failures, outlook, outlook_text, pipeline, run_cost

COST = run_cost.RunCost(
  tokens=2e12,
  mfu=0.4,
  goodput=0.9,
  num_chips=512,
  seconds=86_400 * 50,
  chip_hours=614_400,
  chip_hours_per_trillion_tokens=307_200,
  money=1_228_800,
  money_per_trillion_tokens=614_400,
)
GOODPUT = failures.Goodput(512, 7200, 900, 850, 0.06, 0.04, 0.9)
PIPELINE = pipeline.Pipelined(
  schedule='1f1b',
  stages=4,
  mesh={'data': 2},
  remat='full',
  micro_batch_size=16,
  micro_batches=12,
  passes=1,
  hbm_bytes=3 * 2**30,
  hbm_capacity_bytes=4 * 2**30,
  activation_bytes=2**30,
  sent_bytes=1e9,
  seconds={'compute': 8.0, 'ici': 4.0},
  bubble_seconds=2.0,
  bubble_share=0.2,
  step_seconds_bound=10.0,
  step_seconds_one_by_one=14.0,
)


def test_word_by_word():
  found = outlook.Outlook(COST, GOODPUT, 85, (PIPELINE,), 8.0, 20.0)
  assert (
    outlook_text.table(found)
    == """\
COST of 2e+12 tokens on 512 chips, at 40.0 % MFU and 90.0 % goodput
  chip-hours per trillion tokens         307,200
  money per trillion tokens              614,400
  chip-hours                             614,400
  days                                      50.0
  money                                1,228,800

GOODPUT, saving as often as is best
  a failure every                          2.00 h
  work between checkpoints, Young's         900 s
  work between checkpoints, Daly's          850 s
  which are steps                            85
  lost to checkpoints                      6.00 %
  lost to failures                         4.00 %
  goodput                                 90.00 %

PIPELINE of 4 stages (an estimate that favours it; only gpipe is built), against the plan above
  schedule     bound s  of plan  one by one  of plan  bubble     GiB  of a stage
  none            8.00                20.00
  1f1b           10.00     1.25       14.00     0.70  20.0 %     3.0  data=2; full, 12 x 16"""
  )


def test_what_was_not_asked_is_not_said():
  text = outlook_text.table(outlook.Outlook(COST, None, None, (), 8.0, 20.0))
  assert 'GOODPUT' not in text and 'PIPELINE' not in text
