"""Config values whose model is that of the run whose weights are tuned.

A page of fine-tuning names no sizes: with `objective.inherit` the section `model`, the tokenizer,
its special tokens and the form of conversations are taken from the record of `init_from`, so one
page tunes any model.
"""

import copy
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax import errors
from moe_jax.config import pages, parse, schema
from moe_jax.storage import fetch


def applied(values: dict[str, Any]) -> dict[str, Any]:
  """The values with model and tokenizer of their `init_from`; the same where nothing is inherited.

  Modules of multi-token prediction are left behind where the objective does not train them.
  Without `objective.balance` the balance losses get weight 0, and an expert bias, which stays in
  the model and keeps its routing, the update rate 0: without its rule it would not be there.

  Args:
    values: of a config page, as nested dicts.

  Raises:
    errors.InputError: there is neither a run nor a downloaded checkpoint at `init_from`.
  """
  objective, place = values.get('objective', {}), values.get('init_from', '')
  if not objective.get('inherit') or not place:
    return values
  source = _record(place)
  new = copy.deepcopy(values)
  new['model'] = source['model']
  if objective.get('kind') in schema.OF_ANSWERS:
    new['model']['num_mtp_layers'] = 0
  if not objective.get('balance'):
    _without_balance(new['model']['moe'])
  if not new['data']['tokenizer']:
    new['data']['tokenizer'] = str(pathlib.PurePath(place) / 'tokenizer.json')
    new['data'] |= {key: source['data'][key] for key in ('bos_token', 'eos_token')}
  _with_chat_format(new['data'], source['data'], place)
  return new


def _with_chat_format(data: dict[str, Any], source: dict[str, Any], place: str):
  """Fills in what a page leaves open; of an older import, the template is that of its files."""
  from moe_jax.data import kept_files  # every command imports this module

  data['chat_format'] = data['chat_format'] or source['chat_format']
  kept = fetch.local(place, 'config.init_from') / kept_files.DIRECTORY
  data['chat_template'] = (
    data['chat_template'] or source['chat_template'] or kept_files.chat_template(kept)
  )


def check_template(given: Mapping[str, Any], values: Mapping[str, Any]):
  """Refuses a template that a page or an override gives and another format would ignore.

  Not a rule of configs: tuned runs carry the template of their start, whatever format they chose.

  Args:
    given: values of a page and its overrides.
    values: the same with what is inherited.

  Raises:
    errors.InputError: `data.chat_format` is not 'template'.
  """
  asked = given.get('data', {}).get('chat_template')
  chosen = values.get('data', {}).get('chat_format')
  errors.require(
    not asked or chosen == 'template',
    f'config.data.chat_template is set but data.chat_format={chosen!r} would '
    "ignore it; set data.chat_format='template', or leave the template out",
  )


def _record(place: str) -> dict[str, Any]:
  from moe_jax.interop import huggingface  # every command imports this module

  path = fetch.local(place, 'config.init_from') / 'config.json'
  if huggingface.is_checkpoint(path.parent):
    return parse.to_dict(huggingface.read_config(path.parent, pages.values('base').to_dict()))
  try:
    recorded = json.loads(path.read_text(encoding='utf-8'))['config']
    return parse.to_dict(parse.from_record(recorded))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise errors.InputError(
      f'config.init_from={place} must be the directory of a run, and {path} is no record of one '
      f'({e}); give a workdir of experiments.train, or the directory of a Hugging Face checkpoint '
      '(config.json, tokenizer.json, *.safetensors)'
    ) from e


def _without_balance(moe: dict[str, Any]):
  for part in moe['balance'].values():
    if 'weight' in part:
      part['weight'] = 0.0
  moe['balance']['adaptive']['loss'] = ''
  moe['expert_bias']['update_rate'] = 0.0
