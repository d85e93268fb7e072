import functools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_jax import errors
from moe_jax.inference import generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import transformer
from tests import tiny

# One MoE layer after a dense one, and grouped key-value heads: all that a cache can get wrong.
CFG = tiny.make(model__num_layers=2).model
PROMPTS = [[7], [20, 3], [2, 6, 5, 3, 5, 8, 9]]
NEW = 6
EOS = 14  # the greedy continuation of the first prompt has it third, the others do not have it


@functools.cache
def forward():
  apply = transformer.Transformer(CFG).apply
  return tiny.jit(lambda params, *rows: apply({'params': params}, *rows).logits)


def next_logits(ids):
  """Logits after `ids`, a row of its own, without a cache."""
  tokens = np.zeros((1, CFG.max_seq_len), np.int32)
  tokens[0, : len(ids)] = ids
  at = np.arange(CFG.max_seq_len)[None]
  return forward()(tiny.params(CFG), tokens, at, (at < len(ids)).astype(np.int32))[0, len(ids) - 1]


def greedy(prompt, steps=NEW):
  ids = list(prompt)
  for _ in range(steps):
    ids.append(int(np.argmax(next_logits(ids))))
  return ids[len(prompt) :]


def run(prompts, **sampling):
  return generate.generate(
    CFG, {'params': tiny.params(CFG)}, prompts, NEW, (EOS,), sampling_lib.Sampling(**sampling)
  )


@pytest.fixture(scope='module')
def batch():
  """A greedy run of all prompts together."""
  return run(PROMPTS, temperature=0.0)


def test_greedy_is_the_argmax_of_the_full_forward_of_each_prompt_alone(batch):
  assert batch.tokens[1:] == [greedy(prompt) for prompt in PROMPTS[1:]]
  count = sum(len(row) for row in batch.tokens)
  assert batch.tokens_per_second == pytest.approx(count / batch.seconds)


def test_end_token_stops_its_row_only_and_is_left_out(batch):
  want = greedy(PROMPTS[0])
  assert want.index(EOS) == 2
  assert batch.tokens[0] == want[:2]
  assert [len(row) for row in batch.tokens[1:]] == [NEW, NEW]


@pytest.fixture(scope='module')
def sampled():
  return run(PROMPTS, seed=1).tokens


def test_same_seed_same_text_other_seed_other_text(sampled):
  assert run(PROMPTS, seed=1).tokens == sampled
  assert run(PROMPTS, seed=2).tokens != sampled


def test_equal_prompts_of_a_batch_draw_differently():
  first, second, third = run([PROMPTS[1]] * 3, seed=1).tokens
  assert first != second or second != third


@pytest.mark.parametrize(
  'longest, new, message',
  [
    (11, 6, r'--prompt has 11 tokens.*max_new_tokens=6.*max_seq_len=16; shorten .* to 10 tokens'),
    (1, 16, r'max_seq_len=16; shorten the prompt to 0 tokens or ask for fewer'),
    (1, 99, r'max_seq_len=16; shorten the prompt to 0 tokens'),
    (3, 0, r'--max_new_tokens=0 must be at least 1'),
  ],
)
def test_lengths_that_do_not_fit(longest, new, message):
  with pytest.raises(errors.InputError, match=message):
    generate.check_lengths(CFG, longest, new)


def test_lengths_that_just_fit():
  generate.check_lengths(CFG, 10, 6)


@pytest.mark.parametrize(
  'prompts',
  [[[]], [[1, 2], []], [[1] * 11], [[1], [-1]], [[CFG.vocab_size]], [[2**40]], [[0.5]]],
)
def test_bad_prompts_are_refused_before_compiling(prompts):
  with pytest.raises(errors.InputError, match='--prompt'):
    run(prompts)


# Stop strings and streaming: ids become letters, and some only together.

PIECES = {0: 'ab', 1: 'b', 2: 'c', 3: '\ufffd'}


def text_of(ids):
  """Two-letter and one-letter pieces; a lone 3 is half a character, two in a row are one."""
  text = ''.join(PIECES.get(i, chr(ord('d') + i)) for i in ids)
  return text.replace('\ufffd\ufffd', '\u00e9')


def watched(rows, stop=(), piece=2):
  """Feeds rows of ids to a watch, `piece` tokens at a time -> (texts, tokens, streamed, looks)."""
  streamed = {i: '' for i in range(len(rows))}
  watch = generate._Watch(
    [[9]] * len(rows), text_of, stop, lambda row, text: streamed.update({row: streamed[row] + text})
  )
  ids = np.full((len(rows), max(map(len, rows))), -1, np.int32)
  ended = []
  for n in range(piece, ids.shape[1] + piece, piece):
    for row, tokens in enumerate(rows):
      ids[row, : min(n, len(tokens))] = tokens[:n]
    ended.append(watch.look(ids).tolist())
    for text in streamed.values():
      assert '\ufffd' not in text
      assert not any(s in text for s in stop)
  tokens, texts = watch.finish(ids)
  return texts, tokens, streamed, ended


def test_stop_strings_span_tokens_and_end_their_row_only():
  # a b | b c ...: 'bc' is the end of a first piece, 0 = ab, and a second one, 2 = c.
  texts, tokens, streamed, ended = watched([[5, 0, 2, 7, 7, 7], [5, 6, 7, 8, 9, 10]], ['bc'])
  assert texts == ['ia', 'ijklmn']
  assert tokens == [[5, 0, 2], [5, 6, 7, 8, 9, 10]]  # what was drawn behind the string is left out
  assert ended == [[False, False], [True, False], [True, False]]
  assert streamed == dict(enumerate(texts))


def test_the_first_of_several_stop_strings_counts():
  texts, _, _, _ = watched([[5, 6, 7, 8]], ['l', 'k'])
  assert texts == ['ij']  # i j k l


@pytest.mark.parametrize('piece', [1, 2, 3, 6])
def test_the_text_does_not_depend_on_how_often_the_host_looks(piece):
  """The string that is complete first counts, though a longer one would begin before it."""
  texts, tokens, streamed, _ = watched([[5, 6, 7, 8, 9, 10]], ['jklm', 'k'], piece=piece)
  assert texts == ['ij'] and tokens == [[5, 6, 7]] and streamed[0] == 'ij'  # i j k l m n


def test_half_characters_are_held_back_until_they_are_whole():
  texts, _, streamed, _ = watched([[5, 3, 3, 6]], piece=1)
  assert texts == ['i\u00e9j'] and streamed[0] == texts[0]


def sentencepiece():
  """Each word is its letters behind a mark of the space before it; the first mark is left out."""
  words = [('<unk>', -9.0), *((f'{mark}{c}', -1.0) for mark in ('▁', '') for c in 'abch')]
  inner = tokenizers.Tokenizer(models.Unigram(words, 0))
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  return inner


def test_a_completion_is_what_decoding_the_whole_adds_to_the_prompt():
  """'a b' and 'h h h' are 'a b h h h': a decoder that leaves out the first space loses none."""
  inner = sentencepiece()
  prompt, new = (inner.encode(text).ids for text in ('a b', 'h h h'))
  assert inner.decode(new) == 'h h h'
  assert generate.continuation(inner.decode, prompt, new) == ' h h h'
  assert inner.decode(prompt) + ' h h h' == inner.decode(prompt + new)
  assert generate.continuation(inner.decode, prompt, []) == ''
  # And the same while it comes, and with a prompt longer than what is decoded again.
  sent = []
  watch = generate._Watch([prompt * 200], inner.decode, ['zz'], lambda row, text: sent.append(text))
  for n in range(1, 4):
    watch.look(np.array([[*new[:n], *[-1] * (3 - n)]]))
  assert watch.finish(np.array([new]))[1] == [' h h h'] == [''.join(sent)]


def test_a_character_that_begins_in_the_prompt_belongs_to_the_completion():
  assert generate.continuation(text_of, [0, 3], [3, 1]) == '\u00e9b'
  assert generate.continuation(text_of, [0, 3], []) == ''


def test_what_may_begin_a_stop_string_is_sent_at_the_end_if_it_does_not():
  texts, _, streamed, ended = watched([[5, 6, 1]], ['bcd'], piece=1)
  assert texts == ['ijb'] and streamed[0] == 'ijb' and not any(e[0] for e in ended)


def test_no_beginning_of_a_stop_string_is_sent_however_long_it_is():
  """It may be longer than all that has been written when the host looks."""
  sent = []
  watch = generate._Watch([[0]], text_of, ['ijklmnop'], lambda row, text: sent.append(text))
  written = [5, 6, 7, 8, 9, 10, 11, 12]
  for n in range(1, 9):
    watch.look(np.array([[*written[:n], *[-1] * (8 - n)]]))
  assert watch.finish(np.array([written]))[1] == [''] and ''.join(sent) == ''


def test_generate_cuts_streams_and_repeats_what_it_is_told():
  """The real loop: a stop string taken out of the greedy text of the longest prompt."""

  def letters(ids):
    return ''.join(chr(ord('A') + i) for i in ids)

  generator = generate.Generator(CFG, {'params': tiny.params(CFG)}, (EOS,))
  greedy = sampling_lib.Sampling(temperature=0.0)
  plain = generator.generate(PROMPTS, NEW, greedy, decode_text=letters)
  assert plain.texts == [letters(row) for row in plain.tokens]
  stop, sent = plain.texts[2][2:4], []
  found = generator.generate(
    PROMPTS, NEW, greedy, decode_text=letters, stop=[stop], on_text=lambda *args: sent.append(args)
  )

  def cut(text):
    return text.split(stop)[0]

  assert found.texts == [cut(text) for text in plain.texts]
  for row in range(3):
    assert ''.join(text for r, text in sent if r == row) == found.texts[row]


def test_a_row_does_not_depend_on_the_rows_behind_it(sampled):
  assert run(PROMPTS[:1], seed=1).tokens == sampled[:1]
  assert run(PROMPTS[:2], seed=1).tokens == sampled[:2]


def test_several_end_tokens(batch):
  text = batch.tokens[2]
  generator = generate.Generator(CFG, {'params': tiny.params(CFG)}, (EOS, text[3]))
  found = generator.generate(PROMPTS, NEW, sampling_lib.Sampling(temperature=0.0))
  assert found.tokens[2] == text[: text.index(text[3])]


def test_repetition_penalty_as_a_loop_over_full_forwards():
  prompt, penalty = PROMPTS[2], 1.5
  ids = list(prompt)
  for _ in range(NEW):
    logits = np.array(next_logits(ids))
    for i in set(ids):
      logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
    ids.append(int(np.argmax(logits)))
  found = run([prompt], temperature=0.0, repetition_penalty=penalty)
  want = ids[len(prompt) :]
  assert found.tokens[0] == (want[: want.index(EOS)] if EOS in want else want)
  assert found.tokens[0] != greedy(prompt)


def test_an_empty_stop_string_is_refused():
  generator = generate.Generator(CFG, {'params': tiny.params(CFG)}, (EOS,))
  with pytest.raises(errors.InputError, match="--stop='' would end"):
    generator.generate(PROMPTS, NEW, sampling_lib.Sampling(), decode_text=str, stop=[''])


@pytest.mark.parametrize('stop', [-1, CFG.vocab_size, 0.5])
def test_what_is_no_token_id_stops_nothing_and_is_refused(stop):
  generator = generate.Generator(CFG, {'params': tiny.params(CFG)}, (EOS,))
  with pytest.raises(errors.InputError, match=f'^--stop_id: {stop} is no token id; ids are whole'):
    generator.generate(PROMPTS, NEW, sampling_lib.Sampling(), stop_ids=[stop])


def test_the_nth_token_of_a_row_is_drawn_with_the_nth_key():
  """A head of zeros leaves nothing but the keys."""
  params = tiny.params(CFG)
  blind = {**params, 'head': np.zeros_like(params['head'])}
  sampling = sampling_lib.Sampling(seed=5)
  got = generate.generate(CFG, {'params': blind}, PROMPTS, NEW, (EOS,), sampling)
  logits = np.zeros((len(PROMPTS), CFG.vocab_size), np.float32)
  draws = [
    sampling_lib.draw(
      logits, sampling_lib.Sampling(), sampling_lib.row_keys(np.uint32(5), len(PROMPTS), n)
    )
    for n in range(NEW)
  ]
  assert got.tokens == np.stack(draws, axis=1).tolist()
  assert EOS not in np.ravel(draws)
