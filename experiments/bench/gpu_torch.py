"""transformers' DeepSeek-V2 layer of experts on torch, beside ours; imported where it is used."""

from experiments.bench import gpu_sizes, torch_step
from experiments.common import harness


def runs(sizes: gpu_sizes.Sizes) -> bool:
  """Whether torch has a device for these sizes: CUDA, or a CPU for toys."""
  import torch

  return torch.cuda.is_available() or not sizes.models


def layer(name: str, gradients: bool, sizes: gpu_sizes.Sizes, flops: float) -> harness.Program:
  """The whole layer with its router, at the same sizes in bfloat16.

  Args:
    name: of the group of programs.
    gradients: whether backward runs too.
    sizes: of the layer.
    flops: of a launch.
  """
  import torch
  from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  cfg = configuration_deepseek_v2.DeepseekV2Config(
    hidden_size=sizes.embed_dim,
    moe_intermediate_size=sizes.mlp_dim,
    n_routed_experts=sizes.num_experts,
    num_experts_per_tok=sizes.k,
    n_shared_experts=sizes.num_shared,
    topk_method='greedy',
    experts_implementation=torch_step.EXPERTS,
  )
  module = modeling_deepseek_v2.DeepseekV2Moe(cfg).to(device, torch.bfloat16)
  for parameter in module.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
  shape = (1, sizes.tokens, sizes.embed_dim)
  inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]

  def run(number: int) -> float:
    with torch.set_grad_enabled(gradients):
      for i in range(sizes.launches):
        x = inputs[(number + i) % len(inputs)].requires_grad_(gradients)
        out = module(x)
        if gradients:
          module.zero_grad()
          x.grad = None
          out.backward(inputs[(number + i + 1) % len(inputs)].detach())
    # Waits, for torch launches ahead as JAX does.
    return float(out.detach().flatten()[0])

  variant = f'transformers {torch_step.EXPERTS}'
  return harness.Program(name, variant, run, role='transformers', flops=flops * sizes.launches)
