"""Messages in generated text: write, read, attack, and what they cost (codable watermarks).

python -m experiments.watermark key --key=key.json --proxy=runs/proxy [--kind=balance \
  --message_bits=20 --chunk_bits=20 --tokens_per_bit=10 --secret=N]
python -m experiments.watermark encode --key=key.json --proxy=runs/proxy --workdir=runs/writer \
  --prompt="def main(" --message=42 --out=texts.json [--text="hi" --delta=2 --temperature=1]
python -m experiments.watermark decode --key=key.json --proxy=runs/proxy --texts=texts.json \
  [--from_text --scan --as_text] | --file=page.txt
python -m experiments.watermark attack --texts=texts.json --workdir=runs/judge --out=cut.json \
  --attack=substitute --share=0.1
python -m experiments.watermark study --writer=runs/writer --proxy=runs/proxy --judge=runs/judge \
  --workdir=runs/watermark [--seeds=5 --prompts=24 --out=experiments/watermark]

A key without --proxy is of kind vanilla, and --workdir is then what has its tokenizer. Texts are
JSON: a list of {prompt, ids, text, message}. Nothing that has the key needs the model to read.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli

ACTIONS = ('key', 'encode', 'decode', 'attack', 'study')
ATTACKS = ('substitute', 'paste', 'cut', 'retokenise')


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('run that writes (encode), replaces (attack); directory of results (study)')
  cli.path_flag('proxy', '', 'run of the proxy')
  cli.path_flag('key', '', 'file of the key')
  flags.DEFINE_enum('kind', 'balance', ('balance', 'vanilla'), 'key: how vocabularies are divided')
  flags.DEFINE_integer('secret', None, 'key: a number below 2^64; drawn by the system if none')
  flags.DEFINE_integer('message_bits', 20, 'key: bits of a message')
  flags.DEFINE_integer('chunk_bits', 20, 'key: bits that are written together, at most 20')
  flags.DEFINE_float('tokens_per_bit', 10.0, 'key: tokens that carry one bit')
  flags.DEFINE_multi_string('prompt', None, 'encode: text to continue; repeat it for a batch')
  flags.DEFINE_multi_integer('message', [], 'encode: a number for each prompt')
  flags.DEFINE_multi_string('text', [], 'encode: a short text for each prompt, in UTF-8')
  flags.DEFINE_float('delta', 2.0, 'encode: what unavailable tokens lose in their logits')
  flags.DEFINE_integer('max_new_tokens', 0, 'encode: tokens to add; 0 = what a message needs')
  flags.DEFINE_float('temperature', 1.0, 'encode: divides logits, and delta with them')
  flags.DEFINE_integer('top_k', 0, 'encode: draw among the k most likely tokens; 0 = all')
  flags.DEFINE_float('top_p', 1.0, 'encode: draw among the fewest that reach p')
  flags.DEFINE_integer('seed', 0, 'decides draws, of encode and attack')
  cli.path_flag('texts', '', 'decode, attack: a file of encode or attack')
  cli.path_flag('file', '', 'decode: a text; attack paste: the text around')
  flags.DEFINE_bool('from_text', False, 'decode: read texts, not ids')
  flags.DEFINE_bool('as_text', False, 'decode: the message is a short text')
  flags.DEFINE_bool('scan', False, 'decode: look for messages anywhere')
  flags.DEFINE_float('threshold', 0.99, 'decode: confidence from which a message is claimed')
  flags.DEFINE_enum('attack', 'substitute', ATTACKS, 'attack: what is done')
  flags.DEFINE_float('share', 0.1, 'attack: of tokens that are substituted or cut')
  cli.path_flag('writer', '', 'study: run that writes')
  cli.path_flag('judge', '', 'study: run that says how likely texts are')
  flags.DEFINE_list('seeds', ['5'], 'study: seeds, or how many')
  flags.DEFINE_integer('prompts', 24, 'study: prompts per seed, half of them code')
  flags.DEFINE_integer(
    'windows', 10_000, 'study: unmarked windows times seeds, which read the same'
  )
  cli.path_flag('out', '', 'file (encode, attack) or directory (study) that is written')


def main(argv: Sequence[str], action: str):
  """Does what the action says."""
  if action == 'study':
    from experiments.watermark import study

    study.main(argv)
  else:
    from experiments.watermark import commands

    getattr(commands, action)()


if __name__ == '__main__':
  cli.run_action(main, define_flags, ACTIONS)
