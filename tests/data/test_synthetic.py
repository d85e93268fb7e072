from moe_jax.data import synthetic


def test_documents_are_a_pure_function_of_their_number():
  few, many = list(synthetic.documents(5)), list(synthetic.documents(9))
  assert many[:5] == few
  assert len({text for _, text, _ in many}) == 9
  assert [domain for _, _, domain in few[:4]] == list(synthetic.DOMAINS)


def test_text_can_be_learned():
  texts = {domain: text for _, text, domain in synthetic.documents(4)}
  for line in texts['arithmetic'].splitlines():
    left, right = line.split(' = ')
    assert eval(left) == int(right)
  for line in texts['brackets'].splitlines():
    half = len(line) // 2
    assert line[half:] == line[:half][::-1].translate(str.maketrans('([{', ')]}'))
  compile(texts['code'], 'code', 'exec')
