"""Continues a prompt with a trained run.

python -m experiments.generate --workdir=runs/quickstart --prompt="def main(" --max_new_tokens=64 \
  [--temperature=0.8 --top_k=50 --top_p=0.95 --seed=0 --step=200 --json]
"""

import json
from collections.abc import Sequence

from absl import flags

from experiments import cli
from moe_jax import generate, report, run


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run')
  flags.DEFINE_string('prompt', None, 'text to continue')
  flags.DEFINE_integer('max_new_tokens', 64, 'tokens to add at most')
  flags.DEFINE_float('temperature', 1.0, '0 takes the most likely token')
  flags.DEFINE_integer('top_k', 0, 'draw among the k most likely tokens; 0 = all')
  flags.DEFINE_float('top_p', 1.0, 'draw among the fewest tokens whose probabilities reach p')
  flags.DEFINE_integer('seed', 0, 'decides the draws')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_bool('json', False, 'print one JSON object and nothing else')


def main(unused_argv: Sequence[str]):
  """Prints the prompt and its continuation."""
  values = flags.FLAGS
  workdir, prompt = cli.required('workdir'), cli.required('prompt', may_be_empty=True)
  sampling = generate.Sampling(values.temperature, values.top_k, values.top_p, values.seed)
  loaded = run.load(workdir, values.step)
  completion, result = report.sample(loaded, prompt, values.max_new_tokens, sampling)
  if values.json:
    record = {
      'prompt': prompt,
      'completion': completion,
      'tokens': result.tokens[0],
      'tokens_per_second': result.tokens_per_second,
    }
    print(json.dumps(record))
    return
  print(prompt + completion)
  print(f'[{len(result.tokens[0])} tokens, {result.tokens_per_second:.0f} tokens/s]')


if __name__ == '__main__':
  cli.run(main, define_flags)
