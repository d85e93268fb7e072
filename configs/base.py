"""The only home of default values. A page starts from `get_config()` and changes a few of them.

`moe_jax/config/schema.py` says what each field means; `recipes` and `sizes` hold what several
pages share.
"""

from collections.abc import Callable

import ml_collections

Page = ml_collections.ConfigDict
Variant = Callable[[Page], object]  # changes a page
Variants = dict[str, Variant]

# The tokens over which each balance loss averages in the paper it comes from.
LOSS_SCOPES = {
  'expert_level': 'sequence',
  'device_level': 'sequence',
  'communication': 'sequence',
  'switch': 'micro_batch',
  'gshard': 'micro_batch',
  'squared_deviation': 'micro_batch',
  'normalized_expert_level': 'sequence',
  'mutual_information': 'micro_batch',
  'router_z': 'micro_batch',
  'attention_mutual_information': 'micro_batch',
}


def get_config() -> Page:
  """A small dense-first DeepSeekMoE on the Python standard library; all keys are present."""
  c = ml_collections.ConfigDict()
  c.init_from = ''

  c.model = ml_collections.ConfigDict()
  c.model.vocab_size = 8192
  c.model.tie_embeddings = False
  c.model.max_seq_len = 512
  c.model.embed_dim = 256
  c.model.mlp_dim = 704  # 8/3 D, up to a multiple of 64
  c.model.num_layers = 6
  c.model.num_dense_layers = 1
  c.model.num_heads = 4
  c.model.norm_eps = 1e-6
  c.model.init_std = 0.006
  c.model.dtype = 'float32'
  c.model.param_dtype = 'float32'
  c.model.remat = 'none'
  c.model.scan_layers = True

  c.model.num_mtp_layers = 0
  c.model.attention = _attention()
  c.model.moe = _moe()

  c.data = ml_collections.ConfigDict()
  c.data.source = 'python_source'
  c.data.path = ''  # python_source: the standard library of the running interpreter
  c.data.text_field = 'text'
  c.data.domain_field = ''
  c.data.skip_null_text = False
  c.data.heldout_fraction = 0.02
  c.data.synthetic_documents = 1000
  c.data.tokenizer = 'bpe'  # trained to model.vocab_size entries
  c.data.bos_token = '<｜begin▁of▁sentence｜>'
  c.data.eos_token = '<｜end▁of▁sentence｜>'
  c.data.chat_format = 'deepseek_llm'
  c.data.chat_template = ''
  c.data.fim_rate = 0.0
  c.data.prefetch = 8
  c.data.cache_dir = ''
  c.data.mixture = ml_collections.ConfigDict()

  c.objective = _objective()

  c.trainable = ml_collections.ConfigDict()
  c.trainable.kind = 'all'
  c.trainable.expert_config = ''
  c.trainable.experts = ()
  c.trainable.shared_experts = False
  c.trainable.non_expert_modules = False
  c.trainable.lora_rank = 8
  c.trainable.lora_alpha = 16.0

  c.optim = ml_collections.ConfigDict()
  c.optim.peak_lr = 1e-3
  c.optim.schedule = 'multi_step'
  c.optim.warmup_steps = 100
  c.optim.final_lr_fraction = 0.1
  c.optim.multi_step_boundaries = (0.8, 0.9)
  c.optim.multi_step_factor = 0.316
  c.optim.stages = ()
  c.optim.beta1 = 0.9
  c.optim.beta2 = 0.95
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 1.0
  c.optim.moment_dtype = 'float32'
  c.optim.spike_sigma = 0.0
  c.optim.spike_window = 128

  c.train = ml_collections.ConfigDict()
  c.train.num_steps = 1000
  c.train.batch_size = 32
  c.train.batch_ramp = ()
  c.train.micro_batch_size = 0
  c.train.loss_chunk = 4096
  c.train.seed = 0
  c.train.z_loss_weight = 0.0
  c.train.mtp_loss_weight = 0.3
  c.train.mtp_loss_ramp = ()
  c.train.max_skipped_steps = 3
  c.train.stall_seconds = 1800.0
  c.train.log_every = 10
  c.train.eval_every = 0
  c.train.routing_every = 100
  c.train.sample_prompt = 'def main('
  c.train.sample_tokens = 64

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.save_every = 500
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_every = 0

  c.mesh = ml_collections.ConfigDict()
  c.mesh.stage = 1
  c.mesh.dcn_data = 1
  c.mesh.dcn_fsdp = 1
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.expert = 1
  c.mesh.sequence = 1
  c.mesh.tensor = 1
  c.mesh.stage_micro_batches = 0
  c.mesh.zero1 = False

  c.paper = ml_collections.ConfigDict()
  c.paper.mlp_dim = 0.0
  c.paper.moe_mlp_dim = 0.0
  return c


def _attention() -> Page:
  """The section `model.attention`: MHA; the sizes of MLA are for four heads of 64."""
  attention = ml_collections.ConfigDict()
  attention.kind = 'gqa'
  attention.impl = 'auto'
  attention.num_kv_heads = 4
  attention.head_dim = 64
  attention.num_experts = 0

  attention.rope = ml_collections.ConfigDict()
  attention.rope.theta = 10_000.0
  attention.rope.layout = 'half'
  yarn = attention.rope.yarn = ml_collections.ConfigDict()
  yarn.factor = 1.0
  yarn.original_max_seq_len = 4096
  yarn.beta_fast = 32.0
  yarn.beta_slow = 1.0
  yarn.mscale = 1.0
  yarn.mscale_all_dim = 1.0

  mla = attention.mla = ml_collections.ConfigDict()
  mla.q_lora_rank = 0
  mla.kv_lora_rank = 128
  mla.qk_nope_head_dim = 64
  mla.qk_rope_head_dim = 32
  mla.v_head_dim = 64
  return attention


def _moe() -> Page:
  """The section `model.moe`."""
  moe = ml_collections.ConfigDict()
  moe.num_experts = 63
  moe.num_shared_experts = 1
  moe.num_experts_per_tok = 7
  moe.moe_mlp_dim = 176  # a quarter of mlp_dim: m = 4
  moe.router = 'topk'
  moe.score_func = 'softmax'
  moe.norm_topk_prob = False
  moe.routed_scaling_factor = 1.0
  moe.num_expert_groups = 1
  moe.num_limited_groups = 1
  moe.group_score = 'max'
  moe.num_virtual_devices = 1
  moe.dispatch = 'dropless'
  moe.grouped_matmul = 'auto'
  moe.exchange = ml_collections.ConfigDict()
  moe.exchange.kind = 'auto'
  moe.exchange.buffer_factor = 0.0

  options = moe.options = ml_collections.ConfigDict()
  options.input_jitter = 0.0
  options.logit_norm_scale = 0.0
  options.random_second_expert = False
  options.hash_table = 'random'
  options.chunk_tokens = 0
  options.shuffle_chunks = False
  options.skew = 0.0
  options.inference = 'all'
  options.inference_threshold = 0.48  # DS-MoE 3B
  options.replay_path = ''
  options.replay_rows = 0

  moe.expert_bias = ml_collections.ConfigDict()
  moe.expert_bias.update_rule = 'none'
  moe.expert_bias.form = 'additive'
  moe.expert_bias.update_rate = 1e-3
  moe.expert_bias.update_until = 1.0

  moe.balance = ml_collections.ConfigDict()
  for name, scope in LOSS_SCOPES.items():
    moe.balance[name] = ml_collections.ConfigDict({'weight': 0.0, 'scope': scope})
  moe.balance.expert_level.weight = 0.01
  moe.balance.adaptive = ml_collections.ConfigDict()
  moe.balance.adaptive.loss = ''
  moe.balance.adaptive.slope = 0.2
  moe.balance.adaptive.max_coefficient = 0.01
  moe.balance.adaptive.decay = 0.99
  moe.balance.adaptive.capacity_factor = 1.0

  moe.capacity = ml_collections.ConfigDict()
  moe.capacity.policy = 'none'
  moe.capacity.factor = 1.25
  moe.capacity.group_rows = 1
  moe.capacity.exempt_fraction = 0.0
  moe.capacity.at_eval = False
  return moe


def _objective():
  """Section `objective`: next tokens; of other objectives what their papers have."""
  c = ml_collections.ConfigDict()
  c.kind = 'next_token'
  c.inherit = False
  c.balance = True
  c.dpo = ml_collections.ConfigDict()
  c.dpo.beta = 0.1
  c.dpo.loss = 'sigmoid'
  c.dpo.label_smoothing = 0.0
  c.dpo.length_normalised = False
  c.dpo.sft_weight = 0.0
  c.policy = ml_collections.ConfigDict()
  c.policy.algorithm = 'grpo'
  c.policy.reward = 'answer'
  c.policy.reward_model = ''
  c.policy.prompts = 32
  c.policy.group_size = 8
  c.policy.updates = 1
  c.policy.max_new_tokens = 64
  c.policy.temperature = 1.0
  c.policy.rows = 0
  c.policy.supervision = 'outcome'
  c.policy.std = 'sample'
  c.policy.aggregation = 'sequence_mean'
  c.policy.ratio = 'token'
  c.policy.clip_low = 0.2
  c.policy.clip_high = 0.2
  c.policy.dual_clip = 0.0
  c.policy.kl = 'k3'
  c.policy.kl_weight = 0.04
  c.policy.reference_every = 0
  c.policy.truncated = 'keep'
  c.policy.max_draws = 1
  c.policy.replay = 'rollout'
  c.policy.reward_seconds = 5.0
  c.policy.eval_questions = 128
  c.policy.ppo = ml_collections.ConfigDict()
  c.policy.ppo.gamma = 1.0
  c.policy.ppo.gae_lambda = 0.95
  c.policy.ppo.value_weight = 0.1
  c.policy.ppo.value_clip = 0.2
  c.policy.ppo.value_rate = 10.0
  c.policy.ppo.value_warmup = 0
  c.policy.ppo.center_steps = True
  c.process_reward = ml_collections.ConfigDict()
  c.process_reward.labels = ''
  c.process_reward.target = 'hard'
  c.process_reward.outcome = False
  c.process_reward.step_token = '<｜fim▁end｜>'
  c.process_reward.good = '+'
  c.process_reward.bad = '-'
  return c
