"""The command `generate` on an imported V3 with a prediction module: batches, stops, drafts."""

import json

import numpy as np
import pytest

from experiments import generate
from moe_jax import errors
from moe_jax.interop import huggingface
from tests import in_process, tiny
from tests.interop import checkpoints


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  root = tmp_path_factory.mktemp('generate')
  hf = checkpoints.config('deepseek_v3', torch_dtype='float32')
  weights = checkpoints.tensors(hf, np.float32)
  original = checkpoints.write(root / 'in', hf, weights)
  huggingface.import_checkpoint(original, tiny.values(), root / 'run')
  return root / 'run'


def ask(capsys, workdir, *arguments):
  return in_process.run_json(capsys, generate, f'--workdir={workdir}', *arguments)


SHORT = '--max_new_tokens=6'
GREEDY = '--temperature=0'


@pytest.fixture(scope='module')
def batch(workdir):
  """Each of two prompts alone, greedy."""

  def run(capsys):
    prompts = ('ab', 'a longer one')
    alone = [ask(capsys, workdir, f'--prompt={p}', SHORT, GREEDY) for p in prompts]
    return prompts, alone

  return run


def test_several_prompts_are_one_batch_from_flags_or_a_file(capsys, workdir, batch, tmp_path):
  prompts, alone = batch(capsys)
  together = ask(capsys, workdir, *(f'--prompt={p}' for p in prompts), SHORT, GREEDY)
  assert [r['tokens'] for r in together] == [r['tokens'] for r in alone]
  assert set(together[0]) == {'prompt', 'completion', 'tokens', 'tokens_per_second'}
  file = tmp_path / 'prompts.txt'
  file.write_text(f'\ufeff{prompts[0]}\r\n\n{json.dumps(prompts[1])}\n', newline='')
  found = ask(capsys, workdir, f'--prompts_file={file}', SHORT, GREEDY)
  assert [r['prompt'] for r in found] == list(prompts)
  assert [r['tokens'] for r in found] == [r['tokens'] for r in alone]


def test_lines_of_a_file_are_json_or_text_and_it_is_said_which(capsys):
  lines = ['plain', '', '"two\\nlines"', '"""A docstring."""', '"half', '"a" and "b"']
  texts = generate._lines(lines)
  assert texts == ['plain', 'two\nlines', '"""A docstring."""', '"half', '"a" and "b"']
  said = capsys.readouterr().err
  assert '1 lines of --prompts_file were read as JSON' in said and 'line 4, 5, 6 begins' in said
  assert generate._lines(['plain']) == ['plain'] and not capsys.readouterr().err


def test_a_special_token_in_a_prompt_is_the_token_by_a_flag_and_else_a_warning(capsys, workdir):
  asked = ('--max_new_tokens=1', GREEDY)
  plain = ask(capsys, workdir, '--prompt=ab', *asked)
  in_process.run(generate, f'--workdir={workdir}', '--prompt=<s>ab', *asked, '--json')
  out, err = capsys.readouterr()
  assert '--prompt spells <s>, read as ordinary characters' in err
  meant = ask(capsys, workdir, '--prompt=<s>ab', *asked, '--special_tokens')
  assert meant['tokens'] == plain['tokens']


def test_a_downloaded_checkpoint_is_read_as_it_lies(capsys, workdir):
  asked = ('--prompt=ab', SHORT, GREEDY)
  direct = ask(capsys, workdir.parent / 'in', *asked)
  assert direct['tokens'] == ask(capsys, workdir, *asked)['tokens']
  assert not (workdir.parent / 'in/checkpoints').exists()


@pytest.mark.slow  # compiles the loop with drafts
def test_drafts_change_no_greedy_text_and_are_counted(capsys, workdir, batch):
  prompts, alone = batch(capsys)
  found = ask(capsys, workdir, f'--prompt={prompts[1]}', SHORT, GREEDY, '--speculative')
  assert found['tokens'] == alone[1]['tokens']
  in_process.run(
    generate, f'--workdir={workdir}', f'--prompt={prompts[1]}', SHORT, GREEDY, '--speculative'
  )
  assert 'drafts accepted' in capsys.readouterr().out


def test_streaming_prints_what_is_printed_without(capsys, workdir):
  lines = []
  for flag in ('--nostream', '--stream'):
    in_process.run(generate, f'--workdir={workdir}', '--prompt=ab', SHORT, GREEDY, flag)
    lines.append(capsys.readouterr().out.rpartition('\n[')[0])
  assert lines[0] == lines[1] and lines[0].startswith('ab')


def test_stop_ids_end_a_text(capsys, workdir, batch):
  tokens = batch(capsys)[1][0]['tokens']
  stop = tokens[2]
  found = ask(capsys, workdir, '--prompt=ab', SHORT, GREEDY, f'--stop_id={stop}')
  assert found['tokens'] == tokens[: tokens.index(stop)]


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--prompt is missing'),
    (['--prompt=a', '--prefix=b', '--suffix=c'], 'give --prompt, --prompts_file, or --prefix'),
    (['--prefix=b'], '--prompt is missing'),
    (['--prefix=a', '--suffix=b', '--special_tokens'], 'has no effect with --prefix'),
    (['--prompts_file=/no/such/file'], '--prompts_file=/no/such/file cannot be read'),
    (['--prompt=a', '--prompt=b', '--stream'], '--stream shows one text'),
    (['--prompt=a', '--stop=x', '--speculative'], '--speculative cannot go with --stop'),
    (['--prompt=a', '--repetition_penalty=1.5', '--speculative'], 'cannot go with --speculative'),
    (['--prompt=a', '--min_p=2'], '--min_p=2.0 must be'),
    (['--prompt=a', '--max_new_tokens=100000'], 'more than model.max_seq_len'),
  ],
)
def test_bad_requests(workdir, arguments, message):
  with pytest.raises(errors.InputError, match=message):
    in_process.run(generate, f'--workdir={workdir}', *arguments)
