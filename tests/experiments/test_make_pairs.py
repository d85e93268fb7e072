import json
import types

import pytest

from configs import base, sft
from experiments import answers, make_pairs
from moe_jax import errors
from moe_jax.api import load
from moe_jax.config import schema
from moe_jax.data import preferences, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from tests import in_process


@pytest.fixture
def model(tmp_path, monkeypatch):
  """A run whose answers all are `text`, in place of the one that the command loads."""
  values = sft.get_config().data.to_dict() | {'cache_dir': str(tmp_path), 'tokenizer': 'bytes'}
  values |= {'path': '?max_value=20&operations=2&problems=200', 'chat_format': 'deepseek_llm'}
  tokens = base.get_config().data
  found = types.SimpleNamespace(
    config=types.SimpleNamespace(data=schema.DataConfig(**values)),
    tokenizer=tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token),
    text=' The answer is 999.',
    asked=[],
  )

  def complete(prompts, max_new_tokens, sampling):
    found.asked.append((len(prompts), max_new_tokens, sampling.temperature))
    return generate.Generation([[0] * 5 for _ in prompts], [found.text for _ in prompts], 1.0)

  found.complete = complete
  monkeypatch.setattr(load, 'load', lambda *args, **kwargs: found)
  monkeypatch.setattr(make_pairs.cli, 'required', lambda name: str(tmp_path / name))
  return found


def test_pairs_of_training_questions_are_written_and_counted(model, tmp_path, capsys):
  in_process.run(make_pairs, '--n=6', '--samples=2', '--temperature=0.5', '--max_new_tokens=20')
  lines = (tmp_path / 'out').read_text().splitlines()
  assert len(lines) == 6 and model.asked == [(6, 20, 0.5)] * 2
  for line in lines:
    pair = preferences.from_row(json.loads(line))
    assert pair.rejected[-1].content == 'The answer is 999.'
    question, share = pair.chosen[0].content, model.config.data.heldout_fraction
    assert not sources.is_heldout(question, share)
  assert '6 pairs from 6 questions; of 12 samples 0 right, 12 wrong' in capsys.readouterr().out


def test_a_model_without_a_wrong_answer_leaves_no_file(model, tmp_path):
  model.complete = lambda prompts, n, sampling: generate.Generation(
    [[0] * n for _ in prompts], ['' for _ in prompts], 1.0
  )
  with pytest.raises(errors.InputError, match='has answered none of 6 questions wrongly'):
    in_process.run(make_pairs, '--n=6')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('flag', 'words'), [('--n=0', '--n=0 must be'), ('--temperature=0', 'all samples would be')]
)
def test_bad_flags_are_one_error(model, flag, words):
  with pytest.raises(errors.InputError, match=words):
    in_process.run(make_pairs, flag)


@pytest.mark.parametrize('command', [make_pairs, answers])
def test_another_run_is_named_by_its_flag(command, tmp_path):
  out = (f'--out={tmp_path}/out',) if command is make_pairs else ()
  with pytest.raises(errors.InputError, match='^--like=.*nope holds no checkpoints'):
    in_process.run(command, f'--workdir={tmp_path}', f'--like={tmp_path}/nope', *out)
