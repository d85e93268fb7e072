import json
import math
import os
import pathlib
import threading

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboardX import record_writer

from moe_jax import errors
from moe_jax.runs import metric_log


def line(step: int, **changes):
  values = {
    'step': step,
    'loss': float(np.float32(10 / (step + 1))),
    'lr': 1e-3,
    'grad_norm': 0.53,
    'tokens_per_second': 5123.4,
    'mfu': 0.312,
    'max_vio': 0.53,
    'drop_rate': 0.125,
    'overflow_rate': 0.0,
    'aux_loss': 0.01,
    'mtp_loss': None,
    'data_wait_share': 0.001,
    'save_stall_share': 0.004,
    'skipped_steps': 0,
  }
  return {**values, **changes}


def write(workdir, steps, resume_step=0):
  writer = metric_log.MetricWriter(workdir, resume_step=resume_step, enabled=True)
  for step in steps:
    writer.write(line(step))
  writer.close()


def test_lines_have_exactly_the_promised_keys_and_all_digits(tmp_path):
  write(tmp_path, [1, 2])
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  keys = 'step loss lr grad_norm tokens_per_second mfu max_vio drop_rate overflow_rate '
  keys += 'aux_loss mtp_loss data_wait_share save_stall_share skipped_steps'
  assert [list(json.loads(text)) for text in lines] == [keys.split()] * 2
  assert np.float32(json.loads(lines[1])['loss']) == np.float32(10 / 3)
  assert metric_log.read_metrics(tmp_path) == [line(1), line(2)]


def test_every_line_is_on_disk_when_write_returns(tmp_path):
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=True)
  writer.write(line(1))
  assert metric_log.read_metrics(tmp_path) == [line(1)]
  writer.close()


def test_null_for_what_json_cannot_say(tmp_path):
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=True)
  writer.write(line(1, max_vio=None, loss=math.nan, grad_norm=np.float32(math.inf)))
  writer.close()
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert '"max_vio": null' in text and '"loss": null' in text and '"grad_norm": null' in text
  assert 'NaN' not in text and 'Infinity' not in text


def test_wrong_keys_are_refused(tmp_path):
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=False)
  with pytest.raises(ValueError, match='missing or extra: .*entropy.*mfu'):
    writer.write({k: v for k, v in line(1, entropy=1.0).items() if k != 'mfu'})


def test_disabled_writer_leaves_no_trace(tmp_path):
  writer = metric_log.MetricWriter(tmp_path / 'run', resume_step=0, enabled=False)
  writer.write(line(1))
  writer.write_scalars(1, {'heldout_loss': 3.0})
  writer.close()
  assert not (tmp_path / 'run').exists()


def test_resume_leaves_no_duplicates_and_no_torn_line(tmp_path):
  write(tmp_path, [10, 20, 30])
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 40, "loss": 1.')
  assert [m['step'] for m in metric_log.read_metrics(tmp_path)] == [10, 20, 30]
  write(tmp_path, [30, 40], resume_step=20)
  assert metric_log.read_metrics(tmp_path) == [line(step) for step in (10, 20, 30, 40)]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl', 'tensorboard']


def test_resumed_lines_keep_their_bytes(tmp_path):
  write(tmp_path, [1, 2, 3])
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  write(tmp_path, [3], resume_step=2)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_unreadable_line_in_the_middle_is_reported(tmp_path, caplog):
  write(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'\x00\xff\x00\n[1]\n' + path.read_bytes())
  assert [m['step'] for m in metric_log.read_metrics(tmp_path)] == [1, 2]
  assert '2 unreadable lines' in caplog.text


def test_no_file_means_no_metrics(tmp_path):
  assert metric_log.read_metrics(tmp_path) == []


def test_tensorboard_opens_the_events_without_duplicates(tmp_path):
  write(tmp_path, [10, 20, 30])
  writer = metric_log.MetricWriter(tmp_path, resume_step=20, enabled=True)
  writer.write(line(30, max_vio=None))
  writer.write_scalars(30, {'heldout_loss': 2.5})
  writer.close()
  events = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  assert set(events.Tags()['scalars']) == {*metric_log.KEYS[1:], 'heldout_loss'} - {'mtp_loss'}
  loss = [(e.step, np.float32(e.value)) for e in events.Scalars('loss')]
  assert loss == [(step, np.float32(10 / (step + 1))) for step in (10, 20, 30)]
  assert [e.step for e in events.Scalars('max_vio')] == [10, 20]


def test_a_run_goes_on_where_events_find_no_room_and_says_so_once(tmp_path, monkeypatch, caplog):
  full = pathlib.Path('/dev/full')
  monkeypatch.setattr(record_writer, 'open_file', lambda path: full.open('wb'))
  write(tmp_path, [1, 2, 3])
  assert metric_log.read_metrics(tmp_path) == [line(step) for step in (1, 2, 3)]
  assert caplog.text.count('cannot be written (No space left on device)') == 1


def test_metrics_that_find_no_room_are_one_line(tmp_path):
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=True)
  writer.write(line(1))
  with pathlib.Path('/dev/full').open('ab', buffering=0) as full:
    os.dup2(full.fileno(), writer._file.fileno())
  with pytest.raises(errors.InputError, match=r'no room .*metrics\.jsonl: 2\d\d bytes are needed'):
    writer.write(line(2))
  writer.close()
  assert metric_log.read_metrics(tmp_path) == [line(1)]


def test_the_writer_starts_no_thread_and_leaves_no_file_open(tmp_path):
  threads, handles = threading.active_count(), len(os.listdir('/proc/self/fd'))
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=True)
  writer.write(line(1))
  assert threading.active_count() == threads
  writer.close()
  assert len(os.listdir('/proc/self/fd')) == handles


def test_format_line():
  expected = (
    'step=120 loss=3.4567 lr=1.0e-03 grad_norm=0.53 tokens/s=5123 mfu=31.2% max_vio=0.53 '
    'dropped=12.5% data_wait=0.1%'
  )
  assert metric_log.format_line(line(120, loss=3.45671)) == expected
  assert metric_log.format_line(line(120, mtp_loss=4.0)).endswith('data_wait=0.1% mtp_loss=4.0000')
  assert metric_log.format_line(line(120, overflow_rate=0.25)).endswith(' overflow=25.0%')
  dense = metric_log.format_line(line(120, loss=math.nan, max_vio=None))
  assert 'loss=nan' in dense and 'max_vio=- ' in dense
  assert metric_log.format_line(line(120, skipped_steps=2)).endswith(' skipped=2')


def test_a_run_of_preferences_has_their_figures_behind_the_others(tmp_path):
  names = 'preference_loss preference_accuracy reward_margin chosen_reward rejected_reward '
  names += 'chosen_tokens rejected_tokens reference_kl'
  figures = {name: i / 8 for i, name in enumerate(names.split())}
  writer = metric_log.MetricWriter(tmp_path, resume_step=0, enabled=True)
  writer.write(line(1, **figures))
  with pytest.raises(ValueError, match="missing or extra: .'reference_kl'."):
    writer.write(line(2, **{k: v for k, v in figures.items() if k != 'reference_kl'}))
  writer.close()
  (found,) = metric_log.read_metrics(tmp_path)
  assert list(found) == [*metric_log.KEYS, *names.split()] and found['reference_kl'] == 7 / 8
  text = metric_log.format_line(line(1, **figures))
  assert 'accuracy=12.5% margin=0.250' in text
  assert 'accuracy' not in metric_log.format_line(line(1))
