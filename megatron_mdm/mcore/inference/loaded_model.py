"""Loads a trained checkpoint from its path as a function from tokens to logits."""

import contextlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from megatron.training import set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args
from megatron.training.global_vars import get_tokenizer, set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from megatron_mdm.config import MDMConfig, destination
from megatron_mdm.data.encoding import named_code
from megatron_mdm.errors import SharedError, UserError
from megatron_mdm.mcore.argument_groups import Group, group
from megatron_mdm.mcore.checkpoint.files import SavedCheckpoint, find_checkpoint
from megatron_mdm.mcore.checkpoint.kept_tokenizer import place_of_tokenizer
from megatron_mdm.mcore.checkpoint.saving import safe_checkpoints
from megatron_mdm.mcore.checkpoint.tokenizer_lookup import tokenizer_of
from megatron_mdm.mcore.data.dataset_helpers import use_shipped_dataset_helpers
from megatron_mdm.mcore.data.documents import position_ids
from megatron_mdm.mcore.device import CPU_DEFAULTS
from megatron_mdm.mcore.flags.architecture import differences
from megatron_mdm.mcore.flags.arguments import (
    add_arguments,
    check_positions_of_blocks,
    to_user_error,
)
from megatron_mdm.mcore.flags.identities import other_tokenizer
from megatron_mdm.mcore.flags.old_checkpoints import complete
from megatron_mdm.mcore.flags.resume import last_block_size
from megatron_mdm.mcore.flags.start import saved_arguments
from megatron_mdm.mcore.model.builder import model_config
from megatron_mdm.mcore.model.inputs import ModelInputs
from megatron_mdm.mcore.ranks import notice
from megatron_mdm.mcore.tokenizer import tokenizer_end_id
from megatron_mdm.objective.blocks import BlockRows

# Arguments in Group.RUN that keep the training run's value: paths of tokenizer and data, names and
# shapes of the checkpoint's tensors, and arguments whose type Megatron's validation changes. All
# others in Group.RUN get their default.
KEPT = """
ckpt_format data_args_path data_cache_path data_path inference_cuda_graph_scope
make_vocab_size_divisible_by mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
mdm_vocab_size megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype
megatron_fsdp_main_params_dtype merge_file moe_grouped_gemm moe_single_grouped_bias
moe_single_grouped_weight null_tokenizer_pad_id object_storage_cache_path padded_vocab_size
per_split_data_args_path special_tokens test_data_path tiktoken_num_special_tokens tiktoken_pattern
tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_model
tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy train_data_path
train_iters train_samples transformer_impl valid_data_path vocab_file
""".split()

# Arguments that inference overrides, whatever group they are in.
INFERENCE_OVERRIDES = {
    # Megatron derived these from that run's tensor-parallel size. None makes it derive them again.
    "tensor_parallel_num_weight_shards": None,
    "expert_tensor_parallel_num_weight_shards": None,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "data_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "step_batch_size_schedule": None,
    "overlap_p2p_comm": False,  # Megatron's value without virtual stages
    "align_param_gather": False,
    "gradient_accumulation_fusion": False,  # with it, torch.autograd.grad returns no gradients
    "skip_train": True,
    "finetune": True,
    "no_load_optim": True,
    "no_load_rng": True,
    "exit_on_missing_checkpoint": True,
    "mdm_views": 1,  # one row per text
    "mdm_text_offset": 0,
    "mdm_rate_sampler": "uniform",
    "mdm_clip": None,
    "mdm_logit_normal": None,
    "mdm_beta": None,
    "mdm_bell_fade_at": None,
    "mdm_anneal_attention_iters": 0,  # attention is bidirectional, and may have blocks
    **{
        destination(f.name): f.default
        for f in fields(MDMConfig)
        if f.name.startswith(("bell_", "ppots_", "eval_"))
    },
    "wandb_project": "",
    # FP8 and FP4 products need certain multiples of rows, but texts have any length. The checkpoint
    # holds the weights in the precision of the run's other tensors.
    "fp8": None,
    "fp8_param_gather": False,
    "fp8_output_proj": False,
    "fp4": None,
    "fp4_param_gather": False,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    `mdm` is computed from the arguments only once. For other settings of the objective, create
    another object with `dataclasses.replace(loaded, args=...)`.

    Attributes:
        model: Megatron's module.
        args: the arguments of the run that trained it, with this process's layout.
        tokenizer: Megatron's tokenizer.
    """

    model: Any
    args: Namespace
    tokenizer: Any

    @cached_property
    def mdm(self) -> MDMConfig:
        """Settings of the objective.

        Raises:
            UserError: the settings contradict each other.
        """
        return MDMConfig.from_args(self.args)

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token.

        Raises:
            UserError: the model has no mask token.
        """
        mask = self.args.mdm_mask_token_id
        if mask is None:
            raise UserError(
                f"the model in {self.args.load} has no mask token, and so nothing to fill in: "
                "convert it with --add-mask-token and train it first"
            )
        return int(mask)

    @property
    def end_token_id(self) -> int | None:
        """Id of the end-of-document token; None if the tokenizer has none."""
        return tokenizer_end_id(self.tokenizer)

    @property
    def opening_token_id(self) -> int | None:
        """The token that preceded each text in training rows: the end-of-document token.

        A shifted model predicts the first token of a text from it. None if the tokenizer has no
        such token, or if texts did not see the end of the text before (--mdm-isolate-documents).
        """
        return None if self.args.mdm_isolate_documents else self.end_token_id

    @property
    def max_length(self) -> int:
        """The largest number of tokens in a row: the number of positions that the model has."""
        return int(self.args.max_position_embeddings)

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; None: whole rows."""
        return None if self.mdm.blocks is None else self.mdm.blocks.size(0)

    def in_blocks(self, size: int | None) -> "LoadedModel":
        """The same model with blocks of `size` tokens; None: whole rows.

        Raises:
            UserError: the model has layers of Transformer Engine that were built for whole rows.
                They would ignore the mask of blocks without a word.
        """
        engine = self.args.transformer_impl == "transformer_engine"
        if engine and self.block_size is None and size is not None:
            raise UserError(
                "layers of Transformer Engine that were built for whole rows cannot run in blocks: "
                "open the checkpoint with a block size, which also allows whole rows"
            )
        args = copy(self.args)
        _change_blocks(args, size)
        return replace(self, args=args)

    @property
    def causal_clean(self) -> bool:
        """Whether clean tokens see no later token of their block; see `BlockRows`."""
        return self.mdm.ar_loss_weight > 0.0

    def block_rows(self, documents: torch.Tensor, views: int = 1) -> BlockRows:
        """The positions of rows in blocks.

        Args:
            documents: see `BlockRows`.
            views: see there.
        """
        assert self.block_size is not None
        return BlockRows(
            documents, self.block_size, views, self.mdm.shift, causal_clean=self.causal_clean
        )

    @torch.no_grad()
    def logits(
        self,
        tokens: torch.Tensor,
        clean: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Logits of the clean tokens.

        Args:
            tokens: int64 [b, s], the same on all ranks.
            clean: the tokens before masking, if they are known, [b, s]. They determine which
                positions are hidden from attention.
            documents: the parts of rows that attention stays within and that number their positions
                from 0, int64 [b, s]; None: each row is one document (a text to fill in, whose end
                is still unknown). Blocks need them, and count from the first token of each.
            causal: whether the model runs as an autoregressive one: causal and shifted.

        Returns:
            float [b, s, V], V the padded vocabulary, the same on all ranks. Logits at position i
            are for token i, even if position i - 1 predicts it (--mdm-shift, or `causal`).

        Raises:
            UserError: the first token is masked, and the model is shifted.
        """
        clean = tokens if clean is None else clean
        if self.mdm.shift:
            self.check_first_tokens(tokens, position_ids(clean, documents))
        eod_id, rows, copies = self.tokenizer.eod, None, 1
        if self.block_size is None:
            inputs = ModelInputs.of_tokens(
                clean, documents, self.mdm, eod_id, self.model, causal=causal
            )
        else:
            assert documents is not None and not causal, "blocks need clean tokens and documents"
            rows = self.block_rows(documents)
            inputs = ModelInputs.of_blocks(clean, rows, self.mdm, eod_id, self.model)
            copies = rows.copies
        logits = self.run(inputs, tokens, tokens.shape[1] * copies)
        if rows is not None:
            return rows.to_tokens(logits)[0]
        if inputs.shift:  # no position predicts the first token, so it keeps its own logits
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        return logits

    def run(
        self, inputs: ModelInputs, tokens: torch.Tensor, s: int, last: int | None = None
    ) -> torch.Tensor:
        """Runs all stages on masked tokens; logits by position.

        Args:
            inputs: the other arguments of the model.
            tokens: int64 [b, tokens of a row], the same on all ranks.
            s: positions of a row.
            last: number of positions at the end that have logits; None: all.

        Returns:
            float [b, s or last, V], V the padded vocabulary, the same on all ranks.
        """
        b = len(tokens)
        outputs = get_forward_backward_func()(
            forward_step_func=lambda _, model: (inputs.logits(model, tokens, last), None),
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=s,
            micro_batch_size=b,
            forward_only=True,
        )
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            if not mpu.is_pipeline_last_stage():
                columns = self.args.padded_vocab_size // self.args.tensor_model_parallel_size
                shape = b, s if last is None else last, columns
                outputs = [tokens.new_empty(shape, dtype=self.args.params_dtype)]
            torch.distributed.broadcast(
                outputs[0],
                mpu.get_pipeline_model_parallel_last_rank(),
                group=mpu.get_pipeline_model_parallel_group(),
            )
        return gather_from_tensor_model_parallel_region(outputs[0])

    def check_first_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Checks that a shifted model need not predict a token that training never predicted.

        Raises:
            UserError: the first token of a row, or of an isolated document, is masked.
        """
        if ((tokens == self.args.mdm_mask_token_id) & (positions == 0)).any():
            raise UserError(
                "the first token of a row is masked, which a shifted model (--mdm-shift) cannot "
                "predict: put a token in front, such as the end of document"
            )


@contextlib.contextmanager
def loaded_model(
    checkpoint: str,
    device: str,
    pipeline_parallel: int = 1,
    edit_args: Callable[[Namespace], None] | None = None,
    hashes: bool = True,
    trust: bool = False,
    block_size: str | None = None,
) -> Iterator[LoadedModel]:
    """Context with a checkpoint loaded over all ranks, whatever layout wrote it.

    Enter it inside `training_device(device)`. Without torchrun there is a single process.

    Args:
        checkpoint: directory that the run named as --save.
        device: `cuda` or `cpu`.
        pipeline_parallel: number of pipeline stages; the ranks of a stage are tensor-parallel.
        edit_args: called with the arguments in the checkpoint before the model is built, to change
            them.
        hashes: whether to compare the files with the checksums that were saved with them.
        trust: whether to run Python code that is beside the tokenizer.
        block_size: see `open_checkpoint`.

    Raises:
        UserError: there is no checkpoint, it is damaged or has no arguments, it was trained in
            blocks and the caller needs whole rows, or the model cannot be divided into these stages
            and ranks.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    found = _named(checkpoint)
    notice(f"checkpoint: {checkpoint}, {found}", file=sys.stderr)
    recorded = _checkpoint_args(found)
    if edit_args:
        edit_args(recorded)
    _set_blocks(recorded, found, block_size)
    args = args_for_inference(recorded, found, device, pipeline_parallel)
    args.mdm_checkpoint_hashes = hashes
    _limit_code(args, trust)
    try:
        set_global_variables(args)
    except (OSError, RuntimeError, ValueError) as error:
        raise _tokenizer_rejection(error, args) from error
    _check_tokenizer(vars(args), get_tokenizer(), args)
    use_shipped_dataset_helpers()
    initialize_megatron()
    try:
        yield LoadedModel(_model(args), args, get_tokenizer())
        torch.distributed.barrier()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def load_other_weights(loaded: LoadedModel, checkpoint: str) -> LoadedModel:
    """The same network with the weights of another checkpoint, beside the first.

    Args:
        loaded: a model, whose layout and tokenizer the result shares.
        checkpoint: directory of a checkpoint of the same network, trained with or without
            --mdm-shift.

    Raises:
        UserError: there is no checkpoint, or it is of another network.
    """
    found = _named(checkpoint)
    notice(f"checkpoint: {checkpoint}, {found}", file=sys.stderr)
    args, saved = loaded.args, vars(_checkpoint_args(found))
    wrong = differences(saved, {**vars(args), "mdm_shift": saved.get("mdm_shift")}, args.load)
    for name in ("padded_vocab_size", "max_position_embeddings"):
        if saved[name] != getattr(args, name):
            wrong = wrong or f"{name} is {saved[name]} and not {getattr(args, name)}"
    if wrong:
        raise UserError(f"the checkpoint in {checkpoint} is of another network: {wrong}")
    _check_tokenizer(saved, loaded.tokenizer, args)
    own = args.load, args.ckpt_step
    args.load, args.ckpt_step = checkpoint, found.iteration
    try:
        return LoadedModel(_model(args), args, loaded.tokenizer)
    finally:
        args.load, args.ckpt_step = own


def _model(args: Namespace) -> torch.nn.Module:
    """Megatron's module with the weights of `args.load`, in evaluation mode."""
    with safe_checkpoints(args.mdm_checkpoint_hashes):
        model, _, _ = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(
                args, model_config(args, MDMConfig.from_args(args))
            ),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    module: torch.nn.Module = unwrap_model(model[0]).eval()
    _check_finite(module, args.load)
    return module


def _check_finite(module: torch.nn.Module, checkpoint: str) -> None:
    """Checks on all ranks together that the weights are finite.

    Args:
        module: this rank's part of the model.
        checkpoint: directory that the weights come from.

    Raises:
        SharedError: on every rank; names the first tensor that holds NaN or infinity.
    """
    own = {
        name: tensor.detach()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point() and tensor.numel()
    }
    largest = torch.stack([torch.linalg.vector_norm(x, torch.inf).float() for x in own.values()])
    bad = (~largest.isfinite()).nonzero()
    names: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, list(own)[int(bad[0])] if len(bad) else None)
    for name in names:
        if name is not None:
            raise SharedError(
                f"the checkpoint in {checkpoint} holds NaN or infinity in the tensor {name}: its "
                "training has diverged; give an earlier checkpoint of it"
            )


def _checkpoint_args(checkpoint: SavedCheckpoint) -> Namespace:
    """The checkpoint's own arguments, which Megatron validated before it saved them.

    Raises:
        UserError: the checkpoint has none, or they cannot be read.
    """
    saved = saved_arguments(_defaults(), checkpoint)
    if not saved:
        raise UserError(
            f"the checkpoint in {checkpoint.directory} has no arguments: save it with Megatron"
        )
    saved, line = complete(saved)
    if line:
        notice(line, sys.stderr)
    return Namespace(**saved)


def _set_blocks(args: Namespace, checkpoint: SavedCheckpoint, block_size: str | None) -> None:
    """Sets the size of blocks, the same for all rows of this process.

    Args:
        args: arguments of the run that wrote the checkpoint, changed in place.
        checkpoint: the checkpoint.
        block_size: see `open_checkpoint`.

    Raises:
        UserError: it was trained in blocks, and the caller needs whole rows; or its attention
            cannot run in blocks.
    """
    size = last_block_size(args, checkpoint.iteration)
    if block_size is None and size is not None:
        raise UserError(
            f"the checkpoint in {checkpoint.directory} was trained in blocks of {size} tokens, and "
            "this tool reads whole rows: train on, with the phase `row` at the end of "
            "--mdm-block-size-schedule"
        )
    if block_size not in (None, "trained"):
        size = None if block_size == "row" else int(block_size)
    if size is not None:
        check_positions_of_blocks(args, "--block-size")
    _change_blocks(args, size)


def _change_blocks(args: Namespace, size: int | None) -> None:
    """Sets the size of blocks (None: whole rows), and what depends on it, in place."""
    args.mdm_block_size, args.mdm_block_size_schedule = size, None
    args.mdm_shift_first, args.mdm_eval_block_sizes = "clean", None
    if size is None:
        args.mdm_ar_loss_weight = 0.0
        if args.mdm_rate_per == "block":
            args.mdm_rate_per = "row"


def _defaults() -> Namespace:
    """Megatron's arguments and ours without any flag."""
    return parse_args(add_arguments, ignore_unknown_args=True)


def _named(directory: str) -> SavedCheckpoint:
    """The checkpoint that a directory's tracker names.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = find_checkpoint(directory, step_flag=None)
    if found is None:
        raise UserError(f"no checkpoint in {directory}: give the directory that --save named")
    return found


def args_for_inference(
    args: Namespace, checkpoint: SavedCheckpoint, device: str, pipeline_parallel: int
) -> Namespace:
    """Changes the arguments in a checkpoint, in place, for the process that loads it.

    Arguments that describe the model stay. The run's layout, its logs and the checkpoint that it
    started from are replaced.

    Args:
        args: arguments of the run that wrote the checkpoint, perhaps with an earlier version of the
            plugin.
        checkpoint: the checkpoint.
        device: `cuda` or `cpu`.
        pipeline_parallel: number of pipeline stages.

    Raises:
        UserError: the tokenizer is missing, or the model cannot be divided into these stages and
            ranks.
    """
    args.tokenizer_model = _tokenizer_model(args, checkpoint.directory)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tensor_parallel = _tensor_parallel(args, world, pipeline_parallel)
    defaults = vars(_defaults())
    own = {
        # Arguments that Megatron or the plugin added after the checkpoint was written.
        **{name: value for name, value in defaults.items() if not hasattr(args, name)},
        **{
            name: value
            for name, value in defaults.items()
            if group(name) in (Group.RUN, None) and name not in KEPT
        },
        **INFERENCE_OVERRIDES,
        "hybrid_layer_pattern": (getattr(args, "hybrid_layer_pattern", None) or "").replace("|", "")
        or None,
        "rank": int(os.environ.get("RANK", "0")),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "world_size": world,
        "tensor_model_parallel_size": tensor_parallel,
        "expert_tensor_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "transformer_pipeline_model_parallel_size": pipeline_parallel,
        "load": checkpoint.directory,
        "ckpt_step": checkpoint.iteration,
        "mdm_device": device,
        "distributed_backend": "nccl",
        **(CPU_DEFAULTS if device == "cpu" else {}),
    }
    for name, value in own.items():
        setattr(args, name, value)
    return args


def _limit_code(args: Namespace, trust: bool) -> None:
    """Prevents untrusted Python code that the checkpoint's arguments name from running.

    Args:
        args: arguments of the checkpoint; changed in place.
        trust: whether to run the code of its tokenizer.

    Raises:
        UserError: the code would be downloaded from another repository.
    """
    args.trust_remote_code = trust
    args.spec = None  # it names a module to import, but the plugin builds the layers itself
    if trust and args.tokenizer_type == "HuggingFaceTokenizer":
        for name in ("tokenizer_config.json", "config.json"):  # transformers reads both
            elsewhere = [
                code
                for code in named_code(_settings(args, name), "AutoTokenizer", "AutoConfig")
                if "--" in code
            ]
            if elsewhere:
                raise UserError(
                    f"{Path(args.tokenizer_model, name)} names Python code of another repository "
                    f"({elsewhere[0]}), which is not fetched: put the code beside this file, and "
                    "name it there"
                )


def _check_tokenizer(saved: Mapping[str, Any], tokenizer: Any, args: Namespace) -> None:
    """Compares the loaded tokenizer with that of the checkpoint whose arguments are `saved`.

    Raises:
        UserError: they differ.
    """
    difference = other_tokenizer(saved, tokenizer)
    if difference:
        raise UserError(
            f"the tokenizer {args.tokenizer_model or args.tokenizer_type} is not the one that the "
            f"checkpoint was trained with: {difference}. Put the checkpoint's tokenizer there"
        )


def _settings(args: Namespace, name: str) -> dict[str, Any]:
    """The contents of a JSON file beside a Hugging Face tokenizer; empty if it cannot be read.

    In that case transformers reports the error.
    """
    try:
        settings = json.loads(Path(args.tokenizer_model, name).read_bytes())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _tokenizer_rejection(error: Exception, args: Namespace) -> UserError:
    """One line for an exception with which Megatron rejects the tokenizer or other arguments."""
    is_code = args.tokenizer_type == "HuggingFaceTokenizer" and not args.trust_remote_code
    code = named_code(_settings(args, "tokenizer_config.json")) if is_code else []
    if not code:
        return to_user_error(error)
    return UserError(
        f"the tokenizer in {args.tokenizer_model} is Python code ({code[0]}), which runs with "
        "--trust-remote-code only: add it if you trust the code, or convert the model again, which "
        "uses its tokenizer.json"
    )


def _tokenizer_model(args: Namespace, checkpoint: str) -> str | None:
    """The path of the tokenizer on this machine: beside the checkpoint, else the original path.

    Raises:
        UserError: it is in neither place.
    """
    path = tokenizer_of(checkpoint, args)
    if path is None and args.tokenizer_model is not None:
        raise UserError(
            f"the tokenizer of {checkpoint} is not at {args.tokenizer_model}: start in the "
            "directory that the training was started in, or put it beside the checkpoints, as "
            f"{place_of_tokenizer(checkpoint, args)}"
        )
    return path


def _tensor_parallel(args: Namespace, world: int, pipeline_parallel: int) -> int:
    """The number of tensor-parallel ranks of a stage, checked against the model.

    Raises:
        UserError: ranks, layers, heads or vocabulary cannot be divided by these sizes.
    """
    name = "--pipeline-model-parallel-size"
    if pipeline_parallel < 1 or world % pipeline_parallel:
        raise UserError(
            f"{name} {pipeline_parallel} does not divide the {world} ranks: start a multiple of "
            "it with torchrun --nproc-per-node"
        )
    if args.num_layers % pipeline_parallel:
        raise UserError(f"{name} {pipeline_parallel} does not divide the {args.num_layers} layers")
    tensor_parallel = world // pipeline_parallel
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for what, count in (
        ("attention heads", args.num_attention_heads),
        ("query groups", groups),
        ("entries of the padded vocabulary", args.padded_vocab_size),
    ):
        if count % tensor_parallel:
            raise UserError(
                f"{tensor_parallel} tensor-parallel ranks do not divide the {count} {what}: start "
                f"another number of ranks, or give {name} if the tool has this flag"
            )
    return tensor_parallel
