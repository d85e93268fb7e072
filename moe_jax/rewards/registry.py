"""Rewards by name, and sums of them: `answer + 0.1 * format + length(limit=200, margin=50)`.

A name with a dot, `my_rewards.polite(word='please')`, is a function of a module that can be
imported, and is a `reward.Function` that takes the options by name.
"""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import errors
from moe_jax.rewards import latex, programs, reward, steps, text


class Term(NamedTuple):
  """One reward of a sum."""

  name: str  # a key of REWARDS, or module.function
  weight: float
  options: Mapping[str, Any]


# What makes each function from its options.
REWARDS: dict[str, Callable[..., reward.Function]] = {
  'answer': lambda: text.answer,
  'format': text.has_form,
  'length': text.length,
  'steps': lambda: steps.steps,
  'program': programs.isolated,
  'math_verify': latex.math_verify,
}
IN_STEPS = ('steps',)  # those that are given at the end of every step too
_TERM = re.compile(r'\s*(?:([-+]?[\d.]+)\s*\*\s*)?([^\W\d][\w.]*)\s*(?:\((.*)\))?\s*', re.DOTALL)


def by_name(name: str, **options: Any) -> reward.Function:
  """The reward of that name.

  Raises:
    errors.InputError: there is none, or it has no such option.
  """
  errors.require(
    name in REWARDS or '.' in name,
    f'the reward {name!r} must be one of {", ".join(REWARDS)}, or module.function'
    f'{errors.did_you_mean(name, REWARDS)}',
  )
  make = REWARDS[name] if name in REWARDS else functools.partial(_with_options, _imported(name))
  try:
    return make(**options)
  except TypeError as e:
    raise errors.InputError(f'the reward {name!r} with {options} has wrong options: {e}') from e


def _imported(name: str) -> Callable[..., reward.Reward]:
  module, _, function = name.rpartition('.')
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as e:
    raise errors.InputError(
      f'the reward {name!r} must be a function of a module: {e}; correct the name, or put the '
      'directory of the file into PYTHONPATH'
    ) from e


def _with_options(function: Callable[..., reward.Reward], **options: Any) -> reward.Function:
  inspect.signature(function).bind('', (), '', {}, **options)  # or every answer would fail alike
  return functools.partial(function, **options)


def parse(spec: str) -> tuple[Term, ...]:
  """The terms of a sum, `answer + 0.1 * format(pattern='.*')`.

  Raises:
    errors.InputError: it has another form.
  """
  terms = []
  for part in _parts(spec):
    match = _TERM.fullmatch(part)
    try:
      if match is None:
        raise ValueError('a term is NAME or WEIGHT * NAME, with options as in NAME(limit=9)')
      terms.append(Term(match[2], float(match[1] or 1), _options(match[3] or '')))
    except (SyntaxError, ValueError) as e:
      raise errors.InputError(
        f'the reward {spec!r} must be a sum such as "answer + 0.1 * format + length(limit=200, '
        f'margin=50)"; its part {part.strip()!r} is none: {e}'
      ) from e
  return tuple(terms)


def _parts(spec: str) -> list[str]:
  """A sum's terms as text: split at each + that stands in no brackets."""
  found, depth = [''], 0
  for character in spec:
    depth += (character == '(') - (character == ')')
    if character == '+' and depth == 0:
      found.append('')
    else:
      found[-1] += character
  return found


def _options(given: str) -> dict[str, Any]:
  call = ast.parse(f'f({given})', mode='eval').body
  if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
    raise ValueError('options are NAME=VALUE')
  return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}


class Sum:
  """A weighted sum of rewards; a `reward.Function`.

  Its kind and its step rewards are those of the first term, whose weight multiplies the step
  rewards too; parts of the terms are told apart by their names.
  """

  def __init__(self, terms: Sequence[Term], functions: Sequence[reward.Function]):
    """Terms, and the function of each."""
    self._terms, self._functions = terms, functions

  @property
  def isolation(self) -> str:
    """What isolates the programs that are run, in words; '' if none are."""
    return ' '.join(getattr(one, 'isolation', '') for one in self._functions).strip()

  def close(self):
    """Ends the processes in which programs are run."""
    for one in self._functions:
      if isinstance(one, programs.Program):
        one.close()

  def __call__(
    self, prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
  ) -> reward.Reward:
    found = [one(prompt, completion_ids, text, example) for one in self._functions]
    both = list(zip(self._terms, found))
    value = sum(term.weight * one.value for term, one in both)
    parts = {f'{term.name}/{key}': x for term, one in both for key, x in one.parts.items()}
    scale, in_steps = self._terms[0].weight, found[0].step_rewards
    scaled = None if in_steps is None else [(end, scale * x) for end, x in in_steps]
    return reward.Reward(value, parts, found[0].kind, scaled)


def build(spec: str, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Sum:
  """The function of a sum.

  Args:
    spec: see `parse`.
    defaults: options of rewards by name, which the sum may override.

  Raises:
    errors.InputError: see `parse` and `by_name`.
  """
  terms = parse(spec)
  for i, term in enumerate(terms):
    errors.require(
      term.name not in [other.name for other in terms[:i]],
      f'the reward {spec!r} must name {term.name!r} once; add its weights up',
    )
  given = defaults or {}
  return Sum(terms, [by_name(t.name, **{**given.get(t.name, {}), **t.options}) for t in terms])


def check(spec: str, defaults: Mapping[str, Mapping[str, Any]] | None = None):
  """Refuses a sum that `build` would refuse, and leaves nothing behind.

  Args:
    spec: see `parse`.
    defaults: see `build`.

  Raises:
    errors.InputError: see `build`; or programs cannot be isolated on this machine.
  """
  build(spec, defaults).close()
