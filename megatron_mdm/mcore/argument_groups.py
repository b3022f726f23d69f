"""Sorts each argument of a run into one of five groups, by what it influences.

A checkpoint holds the arguments of the run that saved it. On a resume Megatron compares only four
of them with the new arguments. A forgotten flag would silently train another model, use other data
or change the training, so `flags/resume.py` compares whole groups.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from megatron_mdm.config import flag


class Group(Enum):
    """The groups.

    Attributes:
        MODEL: the function that the weights compute. It cannot change.
        DATA: the rows that the run sees, and their order.
        OBJECTIVE: the loss and its masks: --mdm-* flags, the seed and the length of a row.
        TRAINING: optimisation, regularisation and precision. They may change on a resume; the run
            then prints a line.
        RUN: layout, speed, paths, logs, intervals and length. They may differ at every start.
    """

    MODEL = "model"
    DATA = "data"
    OBJECTIVE = "objective"
    TRAINING = "training"
    RUN = "run"


def group(name: str) -> Group | None:
    """The group of an argument; None if it is in no group.

    Args:
        name: its name in Megatron's argument namespace.
    """
    if name in _GROUPS:
        return _GROUPS[name]
    if name.startswith("mdm_"):
        return Group.OBJECTIVE
    return Group.RUN if name.startswith(_RUN_FAMILIES) else None


def names(wanted: Group) -> list[str]:
    """The arguments of a group that are listed by name, in alphabetical order."""
    return [name for name, its_group in _GROUPS.items() if its_group is wanted]


def flag_and_value(name: str, value: Any) -> tuple[str, Any]:
    """The flag that sets an argument, and its value as the flag gives it."""
    if name in _STORE_FALSE:
        return _STORE_FALSE[name], not value
    return _OTHER_FLAGS.get(name, flag(name)), value


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of an argument mean the same: None, 0, False and empty values do."""
    return bool(one == other) or (not one and not other)


def changes(args: Namespace, saved: Mapping[str, Any], compared: Iterable[str]) -> list[str]:
    """The flags whose values differ from those in a checkpoint, with both values.

    Args:
        args: the arguments of this run.
        saved: the arguments in the checkpoint.
        compared: names of the arguments to compare.
    """
    found = []
    for name in compared:
        if name in saved and not same_value(getattr(args, name), saved[name]):
            flag, now = flag_and_value(name, getattr(args, name))
            found.append(f"{flag} {now} (checkpoint: {flag_and_value(name, saved[name])[1]})")
    return found


# Megatron's flags whose names differ from their argument's, and flags that turn an argument off.
_OTHER_FLAGS = {
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
}
_STORE_FALSE = {
    "add_bias_linear": "--disable-bias-linear",
    "add_position_embedding": "--no-position-embedding",
    "dsa_indexer_rotate_activation": "--no-dsa-indexer-rotate-activation",
    "dsa_indexer_scoring_relu": "--no-dsa-indexer-scoring-relu",
    "fp8_wgrad": "--no-fp8-wgrad",
    "muon_split_qkv": "--muon-no-split-qkv",
}

_MODEL = """
activation_func_clamp_value add_bias_linear add_position_embedding add_qkv_bias
apply_residual_connection_post_layernorm attention_output_gate dsa_indexer_head_dim
dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_n_heads
dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss
experimental_attention_variant ffn_hidden_size glu_linear_offset group_query_attention
heterogeneous_layers_config_encoded_json hidden_size hybrid_layer_pattern kv_channels
kv_lora_rank layernorm_epsilon layernorm_zero_centered_gamma linear_attention_freq
linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
linear_value_head_dim mamba_head_dim mamba_num_groups mamba_num_heads mamba_state_dim
max_position_embeddings mdm_model mdm_shift moe_apply_probs_on_input moe_ffn_hidden_size
moe_latent_size moe_layer_freq moe_mlp_glu_interleave_size moe_router_enable_expert_bias
moe_router_group_topk moe_router_num_groups moe_router_pre_softmax moe_router_score_function
moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
moe_shared_expert_glu_interleave_size moe_shared_expert_intermediate_size mrope_section mscale
mscale_all_dim mtp_num_layers mtp_use_repeated_layer multi_latent_attention mup_attn_scale_power
mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
no_rope_freq normalization num_attention_heads num_experts num_layers num_query_groups
openai_gelu position_embedding_type q_lora_rank qk_head_dim qk_l2_norm qk_layernorm
qk_pos_emb_head_dim quick_geglu relative_attention_max_distance relative_attention_num_buckets
rope_scaling_factor rope_type rotary_base rotary_interleaved rotary_percent
rotary_scaling_factor rotary_seq_len_interpolation_factor softmax_type spec squared_relu swiglu
untie_embeddings_and_output_weights use_mup use_rope_scaling use_rotary_position_embeddings
v_head_dim window_attn_skip_freq window_size yarn_beta_fast yarn_beta_slow
yarn_correction_range_round_to_int yarn_original_max_position_embeddings
"""

_DATA = """
mdm_row_order mid_level_dataset_surplus mock_data null_tokenizer_eod_id split tokenizer_type
vocab_size
"""

_OBJECTIVE = """
seed seq_length
"""

_TRAINING = """
accumulate_allreduce_grads_in_fp32 adam_beta1 adam_beta2 adam_eps apply_query_key_layer_scaling
apply_wd_to_qk_layernorm attention_dropout attention_softmax_in_fp32 bf16
calculate_per_token_loss clip_grad ddp_param_name_patterns_for_fp32_local_accumulation
decoupled_lr decoupled_min_lr disable_bf16_reduced_precision_matmul dsa_indexer_loss_coeff
end_weight_decay exp_avg_dtype exp_avg_sq_dtype first_last_layers_bf16 fp16
fp16_lm_cross_entropy fp32_residual_connection fp4 fp4_param_gather fp4_recipe fp8
fp8_amax_compute_algo fp8_amax_history_len fp8_interval fp8_margin fp8_output_proj
fp8_param_gather fp8_recipe fp8_wgrad freeze_all_layers global_batch_size grad_reduce_in_bf16
hidden_dropout hysteresis initial_loss_scale lion_beta1 lion_beta2 loss_scale loss_scale_window
lr lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples
lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style main_grads_dtype main_params_dtype
min_loss_scale min_lr moe_aux_loss_coeff moe_expert_capacity_factor
moe_expert_rank_capacity_factor moe_input_jitter_eps moe_router_bias_update_rate
moe_router_dtype moe_router_force_biased moe_router_force_load_balancing
moe_router_load_balancing_type moe_router_quantile_balancing_ema moe_token_drop_policy
moe_z_loss_coeff mtp_detach_heads mtp_loss_scaling_factor muon_coefficient_type
muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov muon_num_ns_steps
muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode no_weight_decay_cond_type
num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 optimizer qk_clip qk_clip_alpha
qk_clip_threshold sgd_momentum start_weight_decay step_batch_size_schedule
te_precision_config_file use_precision_aware_optimizer weight_decay weight_decay_incr_style
"""

_RUN = """
_is_global_batch_size_explicitly_specified account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split activation_offload_fraction adlr_autoresume
adlr_autoresume_interval align_grad_reduce align_param_gather allow_ambiguous_pad_tokens
app_tag_run_name app_tag_run_version apply_rope_fusion attention_backend auto_detect_ckpt_format
barrier_with_L1_time batch_invariant_mode batch_size bias_dropout_fusion bias_gelu_fusion
bias_swiglu_fusion block_data_path cache_mla_latents calc_ft_timeouts chat_template
check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
check_weight_hash_across_dp_replicas_interval checkpoint_activations classes_fraction
clone_scatter_output_in_embedding config_logger_dir context_parallel_size cp_comm_type
cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers create_all_gather_group
create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion
cuda_graph_impl cuda_graph_modules cuda_graph_scope_deprecated cuda_graph_warmup_steps
data_args_path data_cache_path data_parallel_random_init data_parallel_sharding_strategy
data_path data_per_class_fraction data_sharding dataloader_defer_npy_index_mmap
dataloader_fast_cache_load dataloader_inter_document_masking dataloader_type
ddp_average_in_collective ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw
ddp_reduce_scatter_with_fp32_accumulation decode_only_cuda_graphs
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_num_layers
decoder_seq_length decrease_batch_size_if_needed defer_embedding_wgrad_compute
delay_offload_until_cuda_graph delay_wgrad_compute delta_offload_bytes_across_pp_ranks
deprecated_use_mcore_models deterministic_mode disable_jit_fuser disable_msc_deprecated
disable_straggler_on_startup disable_symmetric_registration
distrib_optim_fully_reshardable_mem_efficient distribute_saved_activations distributed_backend
distributed_timeout_minutes distributed_timeout_seconds_after_init dsa_kernel_backend
dump_param_to_param_group_map embedding_init_method_std embedding_path empty_unused_memory_level
enable_chunked_prefill enable_cuda_graph enable_experimental enable_ft_package
enable_full_sharding_in_hsdp enable_msc enable_one_logger encoder_num_layers encoder_seq_length
eod_mask_loss ep_overlap_early_attn_memory_release error_injection_rate error_injection_type
eval_global_batch_size eval_interval eval_iters eval_micro_batch_size evidence_data_path
expert_model_parallel_size expert_tensor_parallel_num_weight_shards expert_tensor_parallel_size
external_cuda_graph fake_process_group fine_grained_activation_offloading
fine_grained_offloading_max_inflight_offloads finetune flash_attention_version flash_decode
fp4_quantizer_factory fp8_quantizer_factory ft_num_warmup_iters full_validation
fused_residual_rmsnorm gpu_sniff_test_interval gradient_accumulation_fusion
gradient_reduce_div_fusion head_lr_mult heterogeneous_layers_config_path
hierarchical_context_parallel_sizes high_priority_a2a_comm_stream high_priority_stream_groups
hybrid_context_parallel hybrid_override_pattern img_h img_w indexer_batch_size
indexer_log_interval init_method_std init_method_xavier_uniform init_model_with_meta_device
is_hybrid_model iter_per_epoch iterations_to_skip keep_fp8_transpose_cache
kitchen_attention_backend langrl_env_config lazy_mpu_init load load_main_params_from_ckpt
local_rank logging_level lr_decay_iters lr_decay_samples make_vocab_size_divisible_by
mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
mamba_training_ssm_states_dtype manual_gc manual_gc_eval manual_gc_interval mask_factor
mask_prob mask_type masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom
mdm_allow_flag_change mdm_checkpoint_hashes mdm_device mdm_ema_decay mdm_eval_block_sizes mdm_head
mdm_overwrite_save
mdm_ppots_file mdm_rate_bins mdm_recipe mdm_vocab_size memory_snapshot_path merge_file metadata_path
micro_batch_size
microbatch_group_size_per_vp_stage min_offloaded_tensor_size mla_down_proj_fusion
mlp_chunks_for_prefill mlp_chunks_for_training mmap_bin_files model_parallel_size
moe_enable_deepep moe_enable_routing_replay moe_grouped_gemm moe_layer_recompute
moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging
moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_fusion moe_router_padding_for_fp8
moe_router_padding_for_quantization moe_shared_expert_overlap moe_single_grouped_bias
moe_single_grouped_weight moe_token_dispatcher_type moe_upcycling_granularity moe_use_upcycling
mtp_hybrid_override_pattern mtp_standalone multiple_validation_sets nccl_all_reduce_for_prefill
nccl_communicator_config_path nccl_ub no_load_optim no_load_rng no_persist_layer_norm
no_save_optim no_save_rng null_tokenizer_pad_id num_channels num_classes
num_dataset_builder_threads num_distributed_optimizer_instances
num_layers_per_virtual_pipeline_stage num_speculative_tokens
num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges object_storage_cache_path
offload_modules offset_sampling_seed_by_dp_rank onnx_safe optimizer_cpu_offload
optimizer_cuda_graph optimizer_offload_fraction outer_dp_sharding_strategy
output_bert_embeddings override_ckpt_iteration override_opt_param_scheduler pad_vocab_size
padded_vocab_size patch_dim per_dataset_sequences_path per_split_data_args_path
perform_initialization perform_rl_step persist_layer_norm phase_transition_iterations
pin_cpu_grads pin_cpu_params pipeline_model_parallel_comm_backend pipeline_model_parallel_layout
pipeline_model_parallel_size pretrained_checkpoint query_in_block_prob rampup_batch_size rank
recompute_activations recompute_granularity recompute_method recompute_modules
recompute_num_layers record_memory_history record_shapes refit_method replication
replication_factor replication_jump rerun_mode reset_attention_mask reset_position_ids
result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag run_workload_inspector_server
sample_rate sequence_parallel sft sft_tokenizer_prompt_format sharp_enabled_group short_seq_prob
skip_train special_tokens start_eval_at_iter stream_ckpt_dequant strict_fsdp_dtensor_load
suggested_communication_unit_size swin_backbone_type symmetric_ar_type te_rng_tracker
tensor_model_parallel_size tensor_parallel_num_weight_shards test_data_path test_mode
tiktoken_num_special_tokens tiktoken_pattern timing_log_level timing_log_option titles_data_path
tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_model
tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy
torch_fsdp2_reshard_after_forward train_data_path train_iters train_samples train_sync_interval
transformer_impl trust_remote_code use_checkpoint_args use_checkpoint_opt_param_scheduler
use_cpu_initialization use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn
use_fused_weighted_squared_relu use_gloo_process_groups use_grouped_gemm_for_dense_mlp
use_grouped_gemm_for_shared_expert use_kitchen_attention use_layer_wise_param_layout
use_legacy_static_engine use_mamba_mem_eff_path use_megatron_fsdp
use_mp_args_from_checkpoint_args use_one_sent_docs use_persistent_ckpt_worker
use_pytorch_profiler use_ring_exchange_p2p use_sharp use_te_activation_func
use_tokenizer_model_from_checkpoint_args use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
use_tp_pp_dp_mapping use_transformer_engine_op_fuser valid_data_path validation_set_names
verify_integrity vocab_extra_ids vocab_file warmup wgrad_deferral_limit world_size yaml_cfg
"""

# Every argument whose name begins with one of these prefixes belongs to RUN.
_RUN_FAMILIES = tuple(
    """
async_ bert_ biencoder_ ckpt_ dino_ dist_ckpt_ exit_ fault_injector_ fim_ flight_recorder_ fsdp_
grpo_ ict_ inference_ inprocess_ log_ logits_ megatron_fsdp_ moe_deepep_ moe_flex_ moe_hybridep_
moe_ncclep_ moe_paged_stash moe_routing_trace_ non_persistent_ one_logger_ overlap_ profile
pytorch_profiler_ retriever_ rl_ save straggler_ tensorboard_ tp_comm_ vision_ wandb_
""".split()
)

_GROUPS = {
    name: its_group
    for its_group, listed in (
        (Group.MODEL, _MODEL),
        (Group.DATA, _DATA),
        (Group.OBJECTIVE, _OBJECTIVE),
        (Group.TRAINING, _TRAINING),
        (Group.RUN, _RUN),
    )
    for name in listed.split()
}
