"""What every field of a run's configuration means, its type, and the rules between fields.

Values live in `configs/*.py` (ml_collections, overridable from the command line); this module holds
the meaning. No dataclass field has a default, so `configs/base.py` is the only home of a value and
a missing or unknown key fails by name. The two meet in `from_dict`, which is called once, before
anything is compiled or written.
"""

import dataclasses
from collections.abc import Mapping

from moe_jax.config import attention_config, mesh_config, moe_config

REMAT_POLICIES = ('none', 'moe_core', 'full', 'offload')
DTYPES = ('float32', 'bfloat16')
SCHEDULES = ('multi_step', 'cosine', 'constant', 'linear', 'stages')
STAGE_SHAPES = ('constant', 'linear', 'cosine')
# Those of conversations, of which a model learns the answers; of pairs of answers; and of text.
CONVERSATION_SOURCES = ('conversations', 'hf_conversations', 'arithmetic', 'programs', 'episodes')
PREFERENCE_SOURCES = ('preferences', 'hf_preferences')
CHAT_SOURCES = (*CONVERSATION_SOURCES, *PREFERENCE_SOURCES)  # all that is no text
# Whose `path` is no path.
PATHLESS_SOURCES = (
  *('hf', 'hf_conversations', 'hf_preferences'),
  *('arithmetic', 'programs', 'episodes', 'synthetic'),
)
SOURCES = (
  *('python_source', 'text', 'jsonl', 'parquet', 'hf', 'synthetic', 'mixture'),
  *CHAT_SOURCES,
)
OBJECTIVES = ('next_token', 'sft', 'dpo', 'policy', 'process_reward')
# Objectives of a trained model's answers: they train no multi-token prediction, and what else is in
# a batch must change nothing.
OF_ANSWERS = ('dpo', 'policy', 'process_reward')
LABEL_TARGETS = ('hard', 'soft')
POLICY_ALGORITHMS = ('grpo', 'rft', 'ppo')
POLICY_SUPERVISION = ('outcome', 'process')
POLICY_STD = ('sample', 'population', 'none')
POLICY_AGGREGATIONS = ('sequence_mean', 'token_mean', 'constant')
POLICY_RATIOS = ('token', 'sequence', 'sequence_token')
POLICY_KLS = ('k2', 'k3')
POLICY_TRUNCATED = ('keep', 'leave_out', 'bootstrap')
REPLAYS = ('rollout', 'update', 'none')
PREFERENCE_LOSSES = ('sigmoid', 'ipo')
TRAINABLE = ('all', 'experts', 'lora')
CHAT_FORMATS = ('deepseek_llm', 'deepseek_v3', 'marks', 'bare', 'template')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A pre-norm decoder: `num_dense_layers` dense blocks, then MoE blocks."""

  vocab_size: int  # rows V of the embedding and of the output head
  # Whether the output head is the embedding: one matrix, with one gradient and one set of moments.
  tie_embeddings: bool
  max_seq_len: int  # L, the longest row a batch holds and the longest context that is generated
  embed_dim: int  # D, width of the residual stream
  mlp_dim: int  # FFN width of the dense layers
  num_layers: int  # all layers, dense ones included
  num_dense_layers: int  # leading layers that keep a dense FFN although the rest are MoE
  num_heads: int  # N, query heads
  norm_eps: float  # RMSNorm epsilon
  init_std: float  # standard deviation of every weight at the start (0.006 in the DeepSeek papers)
  dtype: str  # compute dtype, one of DTYPES; the router, the softmaxes and the losses stay float32
  param_dtype: str  # dtype of the kept weights, one of DTYPES; norms and router stay float32
  remat: str  # one of REMAT_POLICIES: which activations the backward pass recomputes
  scan_layers: bool  # layers of one kind are a loop; False unrolls it: slower to compile
  # Depth D of multi-token prediction (DeepSeek-V3, section 2.2): modules that predict one token
  # further each, trained with train.mtp_loss_weight; they can draft when text is generated.
  num_mtp_layers: int
  attention: attention_config.AttentionConfig
  moe: moe_config.MoEConfig

  @property
  def is_moe(self) -> bool:
    return self.moe.num_experts > 0

  @property
  def num_moe_layers(self) -> int:
    return self.num_layers - self.num_dense_layers if self.is_moe else 0


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
  """One member of `data.source='mixture'`; its name in the config is its domain label."""

  source: str  # one of SOURCES except 'mixture'
  path: str  # as data.path
  weight: float  # share of the training rows, relative to the sum over components


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows of token ids."""

  source: str  # one of SOURCES
  # Roots, files, directories or globs (comma separated), or a dataset's name with ?name=, split=
  # and revision= behind it; '' = the default.
  path: str
  text_field: str  # column that holds the text (jsonl, parquet, hf)
  domain_field: str  # column that holds the domain label; '' = the source's own label
  skip_null_text: bool  # leave out rows whose text is null, and count them, instead of refusing
  heldout_fraction: float  # share of documents kept for evaluation, by a hash of their name
  synthetic_documents: int  # number of documents that source='synthetic' makes
  tokenizer: str  # 'bpe' (trained on the training split), 'bytes', or a path to a tokenizer.json
  bos_token: str  # begin-of-document token; must be in a tokenizer.json that is given
  eos_token: str  # end-of-document token, likewise
  # Of conversations, one of CHAT_FORMATS, of which 'template' is chat_template; '' on a page with
  # objective.inherit = that of init_from.
  chat_format: str
  chat_template: str  # text of a jinja template; '' = that of init_from, if it has one
  fim_rate: float  # share of training documents rearranged as prefix-suffix-middle
  prefetch: int  # batches prepared ahead of the device
  cache_dir: str  # tokenised corpora and tokenizers; '' = $MOE_JAX_CACHE or ~/.cache/moe_jax
  mixture: Mapping[str, MixtureComponent]  # members when source='mixture', by domain label


@dataclasses.dataclass(frozen=True)
class DpoConfig:
  """Direct preference optimisation (arXiv 2305.18290), only read with objective.kind='dpo'."""

  beta: float  # of the implicit reward beta (log policy - log reference)
  loss: str  # 'sigmoid' (DPO), or 'ipo' (arXiv 2310.12036), whose beta is the paper's tau
  label_smoothing: float  # share of pairs taken to be labelled the wrong way round (cDPO); < 0.5
  length_normalised: bool  # log-probabilities are means over an answer's tokens instead of sums
  sft_weight: float  # of the cross-entropy of the chosen answers, per token of them


@dataclasses.dataclass(frozen=True)
class PpoConfig:
  """PPO's value head and advantages (arXiv 1707.06347, GAE: 1506.02438); algorithm='ppo' only."""

  gamma: float  # what a reward is worth one token earlier, 0 to 1
  gae_lambda: float  # 1: advantages are returns less values; 0: errors of one step
  value_weight: float  # of the value loss beside the policy's
  value_clip: float  # how far a value may move from that of the sampler for its loss; 0 = freely
  value_rate: float  # learning rate of the head, in those of the policy
  value_warmup: int  # iterations in which the head alone learns, the policy at rest
  # With supervision='process': rewards of steps less their mean over an iteration, so that writing
  # more steps earns nothing.
  center_steps: bool


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Reinforcement from rewards (GRPO, arXiv 2402.03300); only read with objective.kind='policy'."""

  # 'grpo'; 'rft' (online rejection fine-tuning): right answers alone are learned; 'ppo': advantages
  # by a value head in place of a group's mean, and the distance to the reference in the rewards.
  algorithm: str
  # A sum of rewards, such as 'answer + 0.1 * format' (moe_jax.rewards); one's own by
  # module.function.
  reward: str
  # Run of experiments.process_reward train, whose scores are the rewards of steps, or of whole
  # answers (`:outcome`), in place of those of `reward`; '' = none.
  reward_model: str
  prompts: int  # questions of an iteration
  group_size: int  # answers to each, G of the paper; PPO may do with 1
  updates: int  # optimizer steps on the answers of an iteration, mu of the paper
  max_new_tokens: int  # of an answer
  temperature: float  # of sampling, and of the policy that is trained
  rows: int  # answers that are written at the same time; 0 = all of an iteration
  supervision: str  # 'outcome', or 'process': a reward at the end of every step of an answer
  std: (
    str  # what advantages are divided by: 'sample' or 'population' deviation, or 'none' (Dr.GRPO)
  )
  # 'sequence_mean' (paper): tokens of an answer first, then answers; 'token_mean' (DAPO): all
  # tokens alike; 'constant' (Dr.GRPO): the sum over answers x max_new_tokens.
  aggregation: str
  ratio: str  # of policy and sampler, per 'token', or per 'sequence' or 'sequence_token' (GSPO)
  clip_low: float  # the ratio is held above 1 - clip_low
  clip_high: float  # and below 1 + clip_high (DAPO: larger)
  dual_clip: float  # what bounds a loss of a negative advantage, in advantages; 0 = nothing
  kl: str  # estimate of the distance to the reference, 'k2' or 'k3' (paper)
  kl_weight: float  # beta of the paper; 0 = no reference is kept
  reference_every: int  # iterations after which the reference is the policy; 0 = the start for ever
  # Answers without an end token: 'keep' them, 'leave_out' of the loss, or, in PPO, 'bootstrap': the
  # value of the last state stands for the outcome that did not come.
  truncated: str
  max_draws: int  # batches of questions drawn for enough groups of unequal rewards; 1 = no more
  # Experts that the update uses: those of the sampler ('rollout', R3), those of its own first pass
  # ('update', R2), or its own of the moment.
  replay: str
  reward_seconds: float  # that judging one answer may take
  eval_questions: int  # held-out questions asked at train.eval_every; 0 = none
  ppo: PpoConfig


@dataclasses.dataclass(frozen=True)
class ProcessRewardConfig:
  """Step labels as an LM objective (Math-Shepherd, arXiv 2312.08935); kind='process_reward'."""

  labels: str  # file of experiments.process_reward label
  # 'hard': a step is good if any completion was right; 'soft': drawn good as often as they were.
  target: str
  outcome: bool  # one label at the end of the solution, whether it is right (ORM)
  step_token: str  # special token that ends a step, at whose place the label is predicted
  good: str  # text of the label of a good step, one token
  bad: str  # of a step that is not


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What the weights are trained for."""

  # 'next_token': every token of a text; 'sft': the assistant's turns of conversations, which are
  # never cut, and end tokens with them; 'dpo': the chosen of two answers against the rejected one;
  # 'policy': answers of the model's own, by their rewards (experiments.rl); 'process_reward':
  # whether each step of a solution is good (experiments.process_reward).
  kind: str
  # Whether config.model is that of init_from, and data.tokenizer its tokenizer. What a command line
  # sets of them is changed after that.
  inherit: bool
  # Of an inherited model: whether its balance losses and the updates of its expert bias go on. The
  # field tunes without (docs/topics/fine_tuning.md).
  balance: bool
  dpo: DpoConfig
  policy: PolicyConfig
  process_reward: ProcessRewardConfig


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
  """Which weights are trained. All others stay as `init_from` has them, and have no moments."""

  # 'all'; 'experts': the chosen routed experts (ESFT), and what the two switches below add; 'lora':
  # a pair of matrices of low rank beside every matrix but embedding and head.
  kind: str
  # expert_cfg.json, as experiments.esft writes it. It is read with the page, and its content stands
  # in the three fields below: the content, not the path, is what a run is resumed with.
  expert_config: str
  experts: tuple[tuple[int, ...], ...]  # routed experts of each MoE layer
  shared_experts: bool  # whether the shared experts are trained too
  # Whether attention, routers, norms, dense layers, embedding and head are; multi-token prediction
  # never is.
  non_expert_modules: bool
  lora_rank: int  # of the pair of every matrix, and of every expert's
  lora_alpha: float  # W + alpha / rank A B; 2 times the rank in the paper of ESFT


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with decoupled weight decay on the matrices, norm clipping, warm-up and a schedule."""

  peak_lr: float  # learning rate at the end of the warm-up
  schedule: str  # one of SCHEDULES
  warmup_steps: int  # linear warm-up, from peak_lr / warmup_steps in the first step
  final_lr_fraction: float  # cosine and linear: last learning rate as a share of the peak
  # multi_step: shares of num_steps at which the rate drops
  multi_step_boundaries: tuple[float, ...]
  multi_step_factor: float  # factor at each boundary (0.316 in the DeepSeek papers)
  # stages: ((until share of num_steps, share of peak_lr at its end, one of STAGE_SHAPES), ...)
  stages: tuple[tuple[float, float, str], ...]
  beta1: float  # decay of AdamW's first moment
  beta2: float  # decay of its second moment
  eps: float  # added to the root of the second moment
  weight_decay: float  # decoupled, on matrices only, times the learning rate
  clip_norm: float  # largest global gradient norm; 0 = no clipping
  moment_dtype: str  # dtype in which both moments are kept, one of DTYPES (DeepSeek-V3: bfloat16)
  # A step is skipped whose loss or gradient norm lies this many standard deviations above the mean
  # of the last spike_window steps (OLMo: 6 and 128); 0 = none is.
  spike_sigma: float
  spike_window: int  # steps; the rule begins once half of them were seen


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length, batch, losses and rhythm of the training loop."""

  num_steps: int  # optimizer steps of the whole run
  batch_size: int  # sequences per optimizer step, over all devices and processes
  # Ramp ((until step, batch size), ...): batch_size holds from the last of these steps on.
  batch_ramp: tuple[tuple[int, int], ...]
  micro_batch_size: int  # rows per forward pass, gradients add up; 0 = the whole batch
  loss_chunk: int  # tokens per device whose logits [tokens, V] exist at once
  seed: int  # decides initialisation and data order
  z_loss_weight: float  # weight of the mean squared log-partition of the vocabulary softmax
  mtp_loss_weight: float  # lambda of multi-token prediction (V3: 0.1), over the mean of its depths
  # Ramp ((until share of the run, lambda), ...): mtp_loss_weight holds from the last share on.
  mtp_loss_ramp: tuple[tuple[float, float], ...]
  # Steps in a row that are skipped because loss or gradient is not finite; one more ends the run.
  max_skipped_steps: int
  stall_seconds: float  # without a step or a new phase after which stacks are shown; 0 = never
  log_every: int  # steps between log lines
  eval_every: int  # steps between held-out evaluations; 0 = only at the end
  routing_every: int  # steps between files of routing figures; 0 = only at the end
  sample_prompt: str  # prompt continued at the end of the run; '' = none
  sample_tokens: int  # length of that continuation


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved and which of them are kept."""

  save_every: int  # steps between checkpoints; the last step is always saved
  keep_last: int  # newest checkpoints kept
  keep_every: int  # checkpoints at multiples of this step are kept for ever; 0 = none


@dataclasses.dataclass(frozen=True)
class PaperConfig:
  """Only for `describe`: the widths that the paper's FLOPs convention counts.

  DeepSeekMoE's tables count FFN widths before they are aligned (papers' 8/3 D times the relative
  expert size). 0 = the model's own width.
  """

  mlp_dim: float  # of the dense layers
  moe_mlp_dim: float  # of one expert


@dataclasses.dataclass(frozen=True)
class Config:
  """One run, whole."""

  # Workdir whose newest weights a fresh run starts from, or directory of a downloaded checkpoint;
  # '' = random weights.
  init_from: str
  model: ModelConfig
  data: DataConfig
  objective: ObjectiveConfig
  trainable: TrainableConfig
  optim: OptimConfig
  train: TrainConfig
  checkpoint: CheckpointConfig
  mesh: mesh_config.MeshConfig
  paper: PaperConfig
