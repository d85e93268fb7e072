"""transformers' own DeepSeek-V2 generation, which ours stands beside. Needs the extra `hf`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NEEDS = ('torch', 'transformers')


def make_model(shape: Mapping[str, Any], dtype: str, directory: str, threads: int) -> Any:
  """A random model, saved in `directory`; large weights make texts that differ.

  Args:
    shape: settings of transformers' DeepseekV2Config.
    dtype: of the weights.
    directory: where to.
    threads: of torch.
  """
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**shape)).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim > 1:
        weight.normal_(0.0, 1.0 if 'embed' in name else 1.5 * weight.shape[-1] ** -0.5)
  model = model.to(getattr(torch, dtype))
  model.save_pretrained(directory)
  return model.to('cuda' if torch.cuda.is_available() else 'cpu')


def writer(model: Any, num_new: int) -> Callable[[np.ndarray], np.ndarray]:
  """Greedy generation with a cache: prompts [B, P] -> new ids [B, num_new]."""
  import torch

  fixed = dict(max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0)

  @torch.inference_mode()
  def write(prompts: np.ndarray) -> np.ndarray:
    ids = torch.tensor(prompts.astype(np.int64), device=model.device)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **fixed).cpu().numpy()[:, ids.shape[1] :]

  return write
