"""Turns a downloaded DeepSeek checkpoint into a workdir, or a workdir into Hugging Face files.

python -m experiments.convert --from_hf=DeepSeek-V2-Lite --workdir=runs/v2_lite \
  [--param_dtype=float32]
python -m experiments.convert --to_hf=exported --workdir=runs/v2_lite \
  [--step=200] [--dtype=bfloat16]
"""

import sys
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from moe_jax import errors


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of the run: written by an import, read by an export', bucket=True)
  cli.path_flag('from_hf', None, 'directory of a downloaded checkpoint, to import', bucket=True)
  cli.path_flag('to_hf', None, 'directory to export to; absent or empty', bucket=True)
  flags.DEFINE_string('param_dtype', '', "import: dtype of the weights; '' = that of the files")
  flags.DEFINE_bool('allow_nonfinite', False, 'import: take NaN and infinity as they are')
  flags.DEFINE_bool(
    'untie', False, 'import: embedding and head that are one matrix become two, to be trained'
  )
  flags.DEFINE_integer('step', None, 'export: the checkpoint; the newest whole one if not given')
  flags.DEFINE_string('dtype', 'original', 'export: original, bfloat16 or float32')


def main(unused_argv: Sequence[str]):
  """Converts, and says what was converted."""
  from configs import base
  from moe_jax.interop import huggingface

  values = flags.FLAGS
  workdir = cli.required('workdir')
  errors.require(
    bool(values.from_hf) != bool(values.to_hf),
    'give either --from_hf=DIR, to import a checkpoint into --workdir, or --to_hf=DIR, to export '
    'one from it',
  )
  way, idle = (
    ('--from_hf', ('step', 'dtype'))
    if values.from_hf
    else ('--to_hf', ('param_dtype', 'allow_nonfinite', 'untie'))
  )
  cli.refuse_idle(idle, f'with {way}')
  if values.from_hf:
    page = base.get_config().to_dict()
    huggingface.import_checkpoint(
      values.from_hf,
      page,
      workdir,
      param_dtype=values.param_dtype,
      allow_nonfinite=values.allow_nonfinite,
      untie=values.untie,
      argv=sys.argv,
    )
  else:
    huggingface.export_checkpoint(workdir, values.to_hf, step=values.step, dtype=values.dtype)


if __name__ == '__main__':
  cli.run(main, define_flags)
