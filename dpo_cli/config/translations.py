"""What the settings of other trainers are called here; `_TABLE` lists them.

The names are those of TRL, LLaMA-Factory, Axolotl and ms-swift.
"""

from __future__ import annotations

from collections.abc import Iterable

from dpo_cli.evaluation.best import BEST_BY
from dpo_cli.modeling.held import QUANTIZED
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.settings import types
from dpo_cli.training.optimizer import SCHEDULES, Optimizer


def _either(names: Iterable[str]) -> str:
    """Write a choice in a row: `` `a`, `b` or `c` ``."""
    *others, last = (f"`{name}`" for name in names)
    return f"{', '.join(others)} or {last}" if others else last


_STEP = "set `training.pairs_per_step`, which is pairs per device × gradient accumulation × processes"
_WHOLE_LAYERS = "leave it out: an adapter trains no layer as a whole; `adapter: null` trains all weights"
_QUANTIZE = f"set `model.quantize` to {_either(QUANTIZED)}, and `adapter: lora`"
_NO_SHARDS = (
    "leave it out: every process holds the whole model; start several processes with `torchrun -m dpo_cli train …`"
)
_UNPAIRED = "choose a loss on pairs, such as `dpo`: this one learns from single responses with a label, not from pairs"
_ONLINE = "choose a loss on pairs, such as `dpo`: this one lets the model write responses while it trains"
_FIXED = "leave it out: it cannot be set here"

_TABLE: tuple[tuple[str, str], ...] = (
    # The model.
    ("model_name_or_path name_or_path model_id model_path base_model pretrained_model_name_or_path model_id_or_path",
     "set `model.name`"),
    ("ref_model ref_model_name_or_path ref_model_path reference_model",
     "set `reference.model`; without it the reference is the model before step 1"),
    ("torch_dtype bf16 fp16 tf32 half precision mixed_precision pure_bf16 load_dtype model_dtype",
     f"set `model.dtype`: {_either(('auto', *PRECISIONS))}"),
    ("template chat_template_path custom_chat_template chat_template_jinja",
     "set `model.chat_template` to a Jinja file or `plain`; the tokenizer's own template is the default"),
    ("attn_implementation attn_impl flash_attn flash_attention sdp_attention use_liger use_liger_kernel "
     "enable_liger_kernel",
     "leave it out: `training.layout` decides how attention is computed"),
    ("revision model_revision tokenizer_name tokenizer_name_or_path",
     "leave it out, and name a local folder in `model.name`"),
    ("peft peft_config use_peft lora lora_config use_lora adapters finetuning_type train_type tuner_type",
     "set `adapter: lora`, or as a group `adapter: {type: lora, rank: …, alpha: …}`"),
    ("qlora", _QUANTIZE),
    ("lora_r lora_rank r", "set `adapter.rank`"),
    ("lora_alpha", "set `adapter.alpha`"),
    ("lora_dropout", "set `adapter.dropout`"),
    ("lora_target lora_target_modules target_modules lora_target_linear",
     "set `adapter.targets` to all-linear, a list of names or a pattern; all-linear is the default"),
    ("use_dora", "set `adapter.dora: true`"),
    ("use_rslora", "set `adapter.rslora: true`"),
    ("adapter_name_or_path lora_model_dir lora_model_path resume_from_adapter",
     "set `adapter.start` to the adapter's folder: training goes on from it"),
    ("modules_to_save lora_modules_to_save additional_target freeze_trainable_layers", _WHOLE_LAYERS),
    ("init_lora_weights lora_init pissa_init loraplus_lr_ratio", _FIXED),
    ("load_in_4bit load_in_8bit quantization_bit quantization_config quant_bits quant_method", _QUANTIZE),
    ("bnb_4bit_quant_type bnb_4bit_compute_dtype use_bnb_nested_quant bnb_4bit_use_double_quant quantization_type",
     "leave it out: `model.quantize` decides it"),
    ("device_map deepspeed fsdp fsdp_config tensor_parallel_size tensor_parallel pipeline_parallel "
     "context_parallel_size sequence_parallel_size dp_shard_size",
     _NO_SHARDS),
    # The data.
    ("dataset dataset_name datasets dataset_path train_file train_dataset dataset_dir train_data data_path",
     "set `data.train` to a file, a folder or a Hub id"),
    ("dataset_config dataset_config_name", "set `config` of a source: `data: {train: {path: …, config: …}}`"),
    ("dataset_split dataset_train_split train_split", "set `split` of a source: `data: {train: {path: …, split: …}}`"),
    ("eval_dataset eval_file validation_file val_dataset test_datasets dataset_test_split eval_data",
     "set `data.eval` to a file, a folder or a Hub id"),
    ("val_size val_set_size split_dataset_ratio eval_split_ratio", "set `data.eval` to the fraction that is held out"),
    ("max_seq_length max_seq_len max_sequence_length sequence_len cutoff_len model_max_length max_tokens",
     "set `data.max_length`, the limit for prompt and response together"),
    ("max_prompt_length max_completion_length max_target_length max_response_length max_source_length",
     "set `data.max_length`, the limit for prompt and response; `data.on_too_long: truncate` shortens prompts"),
    ("truncation_mode truncation_strategy", "set `data.on_too_long`: `drop`, `truncate` or `error`"),
    ("max_samples max_train_samples limit_samples", "set `limit` of a source: `data: {train: {path: …, limit: …}}`"),
    ("interleave_probs mix_strategy", "set `weight` of each source: `data: {train: [{path: …, weight: …}]}`"),
    ("dataset_format data_format prompt_strategy formatting ranking rlhf_beta_data", "set `data.format`"),
    ("preprocessing_num_workers dataset_num_proc dataloader_num_workers num_proc dataset_prepared_path "
     "overwrite_cache streaming dataloader_drop_last dataloader_pin_memory group_by_length remove_unused_columns",
     "leave it out: data is prepared once, by all CPU cores, and read from disk"),
    ("packing sample_packing neat_packing padding_free pad_to_sequence_len pad_to_multiple_of",
     "set `training.layout`: `packed` has no padding, and `auto` chooses it where it is exact"),
    ("prompt_column chosen_column rejected_column prompt_field chosen_field rejected_field field_prompt field_chosen "
     "field_rejected prompt_text_column text_column rejected_text_column column_mapping",
     "set `data.columns`, as in `data: {columns: {prompt: question, chosen: good, rejected: bad}}`"),
    # The loss and the reference.
    ("loss_type pref_loss rlhf rl rlhf_type stage preference_loss", "set `loss.type`"),
    ("loss_weights", "set `weight` of each loss: `loss: [{type: dpo, weight: 1.0}, {type: sft, weight: 0.1}]`"),
    ("dpo_beta pref_beta rl_beta kl_coef", "set `loss.beta`"),
    ("dpo_label_smoothing cdpo_label_smoothing label_smoothing_factor", "set `loss.label_smoothing`"),
    ("rpo_alpha pref_ftx ftx_gamma sft_alpha sft_weight",
     "add the loss `sft` with that weight: `loss: [dpo, {type: sft, weight: …}]`"),
    ("simpo_gamma cpo_simpo_gamma gamma_beta_ratio", "set `loss.gamma` of the loss `simpo`"),
    ("use_weighting wpo_weighting", "set `loss.wpo: true`"),
    ("router_aux_loss_coef moe_aux_loss_coef moe_aux_loss_coeff", "set `loss.router_aux`"),
    ("f_divergence_type f_alpha_divergence_coef", "set `loss.divergence`"),
    ("average_log_prob ld_alpha", "set `loss.logps`: `sum` or `mean`"),
    ("reference_free", "choose a loss without a reference, such as `simpo`"),
    ("precompute_ref_log_probs precompute_ref_batch_size use_ref_cache",
     "set `reference: cached`, which is the default: it computes them once, before step 1"),
    ("sync_ref_model ref_model_sync_steps ref_model_mixup_alpha",
     "set `reference: {type: synced, every_steps: …, alpha: …}`"),
    # The steps.
    ("per_device_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps batch_size train_batch_size "
     "micro_batch_size global_batch_size auto_find_batch_size grad_accum_steps",
     _STEP),
    ("per_device_eval_batch_size eval_batch_size",
     "leave it out: `training.micro_batch_tokens` limits the tokens of a forward pass"),
    ("num_train_epochs num_epochs n_epochs max_epochs", "set `training.epochs`"),
    ("max_train_steps total_steps num_steps train_iters", "set `training.max_steps`"),
    ("lr peak_lr base_lr", "set `training.learning_rate`"),
    ("lr_scheduler_type lr_scheduler lr_decay_style scheduler scheduler_type",
     f"set `training.schedule`: {_either(SCHEDULES)}"),
    ("warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_fraction warmup_fraction",
     "set `training.warmup_ratio`, which is warm-up steps ÷ all steps"),
    ("optim optimizer_type optimizer_name",
     f"set `training.optimizer`: {_either(types(Optimizer))}"),
    ("adam_beta1 adam_beta2 adam_betas betas", "set `training.optimizer: {type: adamw, betas: [0.9, 0.999]}`"),
    ("adam_epsilon adam_eps", "set `training.optimizer: {type: adamw, eps: 1.0e-8}`"),
    ("optim_args", "set `training.optimizer` as a group: `{type: adamw, betas: …, eps: …}`"),
    ("lr_scheduler_kwargs cosine_min_lr_ratio", _FIXED),
    ("gradient_clipping clip_grad max_norm grad_clip max_gradient_norm gradient_clip_val",
     "set `training.max_grad_norm`"),
    ("wd adam_weight_decay", "set `training.weight_decay`"),
    ("use_gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing recompute_granularity",
     "set `training.gradient_checkpointing: true`"),
    ("data_seed random_seed", "set `training.seed`"),
    ("ddp_timeout ddp_backend", "set `training.rank_timeout`, in seconds"),
    ("disable_dropout dropout attention_dropout",
     "leave it out: dropout is off, except that of an adapter, `adapter.dropout`"),
    ("neftune_noise_alpha torch_compile use_unsloth unsloth activation_offloading",
     "leave it out: it is not supported"),
    # What is written.
    ("output outdir out_dir output_path save_dir run_dir logging_dir", "set `output_dir`"),
    ("run_name experiment_name", "set `output_dir`: a run is named by its folder"),
    ("overwrite_output_dir overwrite", "run `dpo train FILE --overwrite`"),
    ("resume_from_checkpoint resume", "run `dpo train FILE --resume`"),
    ("do_train do_eval do_predict", "leave it out: `dpo train` trains, `dpo eval` scores"),
    ("save_steps save_interval saves_per_epoch", "set `checkpoints.every_steps`"),
    ("save_total_limit save_limit max_checkpoints keep_last", "set `checkpoints.keep`"),
    ("save_strategy save_only_model save_safetensors", "leave it out: `checkpoints.every_steps` sets when to save"),
    ("eval_steps eval_interval evals_per_epoch", "set `evaluation.every_steps`"),
    ("eval_strategy evaluation_strategy eval_on_start eval_delay",
     "leave it out: held-out pairs are scored before step 1, at the end, and every `evaluation.every_steps` steps"),
    ("load_best_model_at_end metric_for_best_model greater_is_better save_best_model",
     f"set `evaluation.best_by` to {_either(BEST_BY)}: `final/` is then the best evaluated step"),
    ("early_stopping_patience early_stopping_steps early_stop_interval early_stopping",
     "set `evaluation.patience`, in evaluations, and `evaluation.best_by`"),
    ("early_stopping_threshold", _FIXED),
    ("logging_steps log_steps log_interval logging_interval",
     "set `logging.every_steps`; `metrics.jsonl` has every step in any case"),
    ("logging_strategy logging_first_step disable_tqdm", "leave it out: every step is written to `metrics.jsonl`"),
    ("report_to use_wandb use_tensorboard wandb tensorboard mlflow plot_loss",
     "set `tracking`, for example to `tensorboard`"),
    ("wandb_project wandb_name swanlab_project",
     "set `tracking`, for example to `{type: wandb, project: my-project, name: my-run}`"),
    ("push_to_hub hub_model_id hub_token hub_strategy",
     "leave it out: upload the run's `final/` with `hf upload`"),
)  # fmt: skip
"""Names, and what to do in their place. Those that are settings here as well are looked for among the settings."""

_BY_NAME = {name: advice for names, advice in _TABLE for name in names.split()}

_LOSSES = {
    **dict.fromkeys(("kto", "kto_pair", "unpaired"), _UNPAIRED),
    **dict.fromkeys(("ppo", "rloo", "grpo", "gspo", "reinforce", "online_dpo", "xpo", "nash_md"), _ONLINE),
    **dict.fromkeys(("rm", "reward", "reward_model", "prm"), "choose a loss such as `dpo`: no reward model is trained"),
    **dict.fromkeys(("sigmoid", "dpo_pair", "vanilla", "rlhf"), "write `dpo`"),
    "cdpo": "write `loss: {type: dpo, label_smoothing: …}`",
    "sigmoid_norm": "write `loss: {type: dpo, logps: mean}`",
    "robust_dpo": "write `robust`",
    "exo_pair": "write `exo`",
    "nca_pair": "write `nca`",
    "bco_pair": "write `bco`",
    "sppo_hard": "write `sppo`",
    "aot_pair": "write `aot`",
    "lddpo": "write `ld_dpo`",
    "rdpo": "write `r_dpo`",
    "apo": "write `apo_zero` or `apo_down`",
}
_REFERENCES = {
    "precomputed": "write `cached`",
    "ema": "write `synced`",
    "reference_free": "write `none`, with a loss that needs no reference, such as `simpo`",
}
_ADAPTERS = {
    "dora": "write `adapter: {type: lora, dora: true}`",
    "rslora": "write `adapter: {type: lora, rslora: true}`",
    **dict.fromkeys(("full", "none", "false"), "write `adapter: null`, which trains all weights"),
    "qlora": "write `adapter: lora`, and set `model.quantize: nf4`",
    **dict.fromkeys(("true", "peft"), "write `adapter: lora`"),
}
_TYPES = {"loss": _LOSSES, "reference": _REFERENCES, "adapter": _ADAPTERS}
"""Types of losses, references and adapters that others have or call so, and what to do in their place."""


def advice(name: str) -> str | None:
    """Return what to do in place of a setting that another trainer calls so, if one does."""
    return _BY_NAME.get(name.replace("-", "_").lower())


def type_advice(group: str, name: str) -> str | None:
    """Return what to do in place of a type of loss, reference or adapter that others have or call so, if they do."""
    return _TYPES.get(group, {}).get(name.replace("-", "_").lower())
