"""What the GPU script runs: sizes, and who goes to which expert."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of every part; FULL is what the targets are set for."""

  tokens: int
  embed_dim: int
  num_experts: int
  mlp_dim: int  # of one expert
  k: int
  num_shared: int
  rows: int  # of attention
  length: int
  heads: int
  vocab_size: int
  chunk: int  # tokens of a tile of the loss
  cache_rows: int
  cache_slots: int
  routings: tuple[str, ...]  # of the layer, see `routing`
  models: bool  # those of papers, or tiny ones
  kernels: tuple[str, ...]  # of grouped products
  flash: tuple[str, ...]  # of attention
  repeats: int
  launches: int  # in flight per timed call: they hide the cost of a launch
  patience: float  # of the guessed seconds of a part, how many must be left


FULL = Sizes(
  tokens=16384,
  embed_dim=2048,
  num_experts=64,
  mlp_dim=1408,
  k=6,
  num_shared=2,
  rows=4,
  length=4096,
  heads=16,
  vocab_size=102_400,
  chunk=4096,
  cache_rows=64,
  cache_slots=8192,
  routings=('balanced', 'zipf', 'hot', 'empty'),
  models=True,
  kernels=('mosaic', 'triton'),
  flash=('mosaic_gpu', 'triton'),
  repeats=10,
  launches=8,
  patience=1.0,
)
TOY = Sizes(
  tokens=64,
  embed_dim=32,
  num_experts=8,
  mlp_dim=16,
  k=2,
  num_shared=1,
  rows=2,
  length=64,
  heads=2,
  vocab_size=128,
  chunk=32,
  cache_rows=2,
  cache_slots=64,
  routings=('balanced', 'empty'),
  models=False,
  kernels=('xla',),
  flash=('xla',),
  repeats=2,
  launches=1,
  patience=0.0,
)


def routing(case: str, tokens: int, num_experts: int, k: int, seed: int = 0) -> np.ndarray:
  """[tokens, k] int32, experts by token.

  Args:
    case: 'balanced'; 'zipf', chances that fall with the square root of the rank, as in trained
      models; 'hot', 30 % of all choices on one expert; 'empty', a quarter of experts never chosen.
    tokens: T.
    num_experts: E.
    k: K.
    seed: of what is drawn.
  """
  rng = np.random.default_rng(seed)
  if case == 'balanced':
    order = rng.permutation(tokens)[:, None] * k + np.arange(k)
    return (order % num_experts).astype(np.int32)
  if case == 'hot':
    drawn = rng.integers(num_experts, size=(tokens, k))
    return np.where(rng.random((tokens, k)) < 0.3, 0, drawn).astype(np.int32)
  chance = np.arange(1, num_experts + 1) ** -0.5
  if case == 'empty':
    chance = np.where(np.arange(num_experts) < num_experts // 4, 0.0, 1.0)
  with np.errstate(divide='ignore'):
    noisy = np.log(chance) + rng.gumbel(size=(tokens, num_experts))
  return np.argsort(-noisy, axis=1)[:, :k].astype(np.int32)
