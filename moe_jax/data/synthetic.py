"""Made-up text that a small model can learn: sums, a small grammar, brackets, tiny functions.

Document i is a pure function of i. The four domains take turns, so that a handful of documents has
them all.
"""

import random
from collections.abc import Callable, Iterator, Sequence

LINES_PER_DOCUMENT = 12

_NOUNS = ('router', 'expert', 'token', 'layer', 'cache', 'gate')
_VERBS = ('feeds', 'selects', 'balances', 'skips', 'scores')
_ADJECTIVES = ('small', 'busy', 'shared', 'idle', 'dense')
_OPERATORS = {'add': '+', 'sub': '-', 'mul': '*'}


def documents(count: int, chosen: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
  """Yields triples (name, text, domain): of `count` documents those of the domains in `chosen`.

  Without it those of all domains.
  """
  labels = list(DOMAINS)
  for i in range(count):
    label = labels[i % len(labels)]
    if chosen and label not in chosen:
      continue
    # `random.Random` promises the same stream for an integer seed in every Python version.
    rng = random.Random(i)
    yield f'synthetic/{i}', ''.join(DOMAINS[label](rng) for _ in range(LINES_PER_DOCUMENT)), label


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
  return options[int(rng.random() * len(options))]


def _digits(rng: random.Random, limit: int) -> int:
  return int(rng.random() * limit)


def _arithmetic(rng: random.Random) -> str:
  a, b = _digits(rng, 50), _digits(rng, 50)
  return f'{a} + {b} = {a + b}\n'


def _grammar(rng: random.Random) -> str:
  subject = f'the {_pick(rng, _ADJECTIVES)} {_pick(rng, _NOUNS)}'
  return f'{subject} {_pick(rng, _VERBS)} the {_pick(rng, _NOUNS)}.\n'


def _brackets(rng: random.Random) -> str:
  pairs = [_pick(rng, ('()', '[]', '{}')) for _ in range(2 + _digits(rng, 5))]
  return ''.join(p[0] for p in pairs) + ''.join(p[1] for p in reversed(pairs)) + '\n'


def _code(rng: random.Random) -> str:
  name = _pick(rng, tuple(_OPERATORS))
  k = _digits(rng, 10)
  return f'def {name}_{k}(x):\n  return x {_OPERATORS[name]} {k}\n\n'


DOMAINS: dict[str, Callable[[random.Random], str]] = {
  'arithmetic': _arithmetic,
  'grammar': _grammar,
  'brackets': _brackets,
  'code': _code,
}
