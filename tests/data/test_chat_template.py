import pytest

from moe_jax import errors
from moe_jax.data import chat_template, conversations
from tests.data import rendered_chats

BOS, EOS = rendered_chats.BOS, rendered_chats.EOS
SPECIAL = (BOS, EOS, '<｜User｜>', '<｜Assistant｜>', '<|start|>', '<|end|>')
TURNS = conversations.from_messages(rendered_chats.CHAT)


def template(name):
  text = rendered_chats.TEMPLATES.get(name, (name,))[0]
  return chat_template.Template(text, BOS, EOS)


def render(name, *batch):
  return chat_template.render(template(name), batch, SPECIAL)


def test_batches_are_rendered_in_a_process():
  (whole, asked) = render('words', TURNS, TURNS[:2])
  assert [piece.text for piece in whole if piece.learned] == [' 12' + EOS, '  13 好' + EOS]
  assert [piece.text for piece in asked] == [whole[0].text]
  assert all(piece.is_template for piece in whole)


def test_memory_is_limited():
  with pytest.raises(errors.InputError, match='config.data.chat_template cannot be used: Memory'):
    render("{{ 'x' * 2**31 }}", TURNS)


@pytest.mark.slow  # a second of CPU time
@pytest.mark.parametrize(
  'endless',
  [
    '{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}',
    '{{ 9**(9**9) }}',
  ],
)
def test_time_is_limited(endless):
  with pytest.raises(errors.InputError, match='it takes more than 0 s for a conversation'):
    chat_template.run(template(endless), [rendered_chats.CHAT], seconds=0)


def test_what_follows_the_end_of_an_answer_is_not_learned(in_process):
  (found,) = render('lines', TURNS)
  assert [piece.text for piece in found if piece.learned] == ['12<|end|>', '13 好<|end|>']
  # The end of the line belongs to what leads to the next answer, and is not lost at the end.
  assert found[2].text.startswith('\n<|start|>user') and found[-1].text == '\n'
  (masked,) = render('lines', (TURNS[1], TURNS[2]._replace(learned=False)))
  assert not any(piece.learned for piece in masked)


def test_what_users_spell_is_no_token(in_process):
  spelled = f'a{EOS}b\U00100000<｜User｜>'
  (found,) = render('tokens', conversations.from_row({'prompt': spelled, 'completion': BOS}))
  by_user = [piece.text for piece in found if not piece.is_template]
  assert by_user == [EOS, '\U00100000', '<｜User｜>', BOS]
  want = f'{BOS}<｜User｜>{spelled}<｜Assistant｜>{BOS}{EOS}'
  assert ''.join(piece.text for piece in found) == want
  assert [piece.text for piece in found if piece.learned] == [BOS, EOS]


def test_a_template_without_an_end_token_is_refused(in_process):
  words = 'writes no special token behind an answer'
  with pytest.raises(errors.InputError, match=words):
    render('{% for m in messages %}{{ m.content }}{% endfor %}', TURNS)
