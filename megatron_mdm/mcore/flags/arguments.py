"""Adds the `--mdm-*` flags to Megatron's, and refuses bad flags in one line before a run starts."""

import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any, NoReturn

from megatron.core.transformer.enums import AttnBackend
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.global_vars import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_mdm.bound import bound_in_words
from megatron_mdm.config import (
    SECTIONS,
    MDMConfig,
    destination,
    flag,
    flag_of,
    requested_device,
)
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import FUSED_BY, TRANSFORMER_ENGINE
from megatron_mdm.mcore.checkpoint.optimizer_state import check_optimizer_state
from megatron_mdm.mcore.checkpoint.tokenizer_lookup import (
    check_tokenizer_path,
    checkpoints_bring_tokenizers,
    tokenizer_rejection,
)
from megatron_mdm.mcore.device import CPU_DEFAULTS
from megatron_mdm.mcore.flags.architecture import check_model
from megatron_mdm.mcore.flags.data_files import (
    check_data_files,
    check_data_flags,
    check_ends_of_documents,
    check_single_texts,
    check_split,
    check_validation,
    check_validation_sets,
)
from megatron_mdm.mcore.flags.fp8 import check_fp8, check_fp8_flags, check_scales
from megatron_mdm.mcore.flags.hybrid_pattern import (
    check_model_class,
    describe_layers,
    model_class,
)
from megatron_mdm.mcore.flags.identities import (
    Identities,
    check_same_data,
    check_tokenizer,
    identities,
)
from megatron_mdm.mcore.flags.layout_checks import check_experts, check_sizes
from megatron_mdm.mcore.flags.old_checkpoints import complete
from megatron_mdm.mcore.flags.resume import plan_resume
from megatron_mdm.mcore.flags.schedule import check_schedule
from megatron_mdm.mcore.flags.start import check_checkpoints, choose_start
from megatron_mdm.mcore.flags.vocabulary import vocabulary_size
from megatron_mdm.mcore.ranks import notice
from megatron_mdm.mcore.tokenizer import tokenizer_end_id, tokenizer_mask_id
from megatron_mdm.objective.block_schedule import BlockSchedule
from megatron_mdm.recipes import RECIPES, expansion, set_recipe_defaults
from megatron_mdm.sizing.flops import UNKNOWN
from megatron_mdm.versions import check_transformer_engine

# Megatron flags that make no sense here or are not supported, and the remedy for each.
REFUSED = {
    "yaml_cfg": "give the settings as flags",
    "mtp_num_layers": "multi-token prediction is causal; leave it out",
    "flash_decode": "decoding with a key-value cache is causal; leave it out",
    "window_size": "sliding-window attention is causal here; leave it out",
    "reset_attention_mask": "use --mdm-isolate-documents",
    "reset_position_ids": "use --mdm-isolate-documents",
    "dataloader_inter_document_masking": "use --mdm-isolate-documents",
    "eod_mask_loss": "use --no-mdm-eod-eligible",
    "fim_data": "fill-in-the-middle is causal; a masked-diffusion model infills by itself",
    "sft": "Megatron's SFT datasets have shifted labels; use --mdm-sft",
    "perform_rl_step": "reinforcement learning is not supported",
    "hybrid_override_pattern": "use --hybrid-layer-pattern",
    "mtp_hybrid_override_pattern": "multi-token prediction is causal; leave it out",
    "hybrid_context_parallel": "it packs rows by length, which changes the row numbers that masks "
    "depend on; leave it out",
    "experimental_attention_variant": "these variants are causal; leave it out",
    "full_validation": "validation uses fixed rows; set --eval-iters",
    "multiple_validation_sets": "name the files of --valid-data-path with --validation-set-names",
    "phase_transition_iterations": "a phase restarts the numbering of rows and repeats their masks",
    "rampup_batch_size": "use --step-batch-size-schedule",
    "iterations_to_skip": "Megatron skips with its own GPT batches; leave it out",
    "moe_expert_capacity_factor": "token dropping makes the loss of a row depend on the other rows "
    "in its micro-batch; leave it out",
    "ddp_average_in_collective": "gradients are summed here and divided by a count over all ranks; "
    "leave it out",
    "overlap_moe_expert_parallel_comm": "its schedule needs another forward step; leave it out",
    "non_persistent_ckpt_type": "a restarted run ignores its checkpoints; use --save-interval with "
    "--save-retain-interval",
    "verify_integrity": "files are hashed and checked without it, by all ranks together; leave it "
    "out",
    "spec": "the layers come from Megatron's own specs; leave it out",
}

# Help texts for flags of Megatron that mean something else here.
HELP = {
    "validation_set_names": "Names of the files of --valid-data-path, one for each. Every file is "
    "then a validation set of its own instead of a part of a mixture. Every set is evaluated on "
    "--eval-iters global batches. The logs show the NELBO of every set, and the mean over the sets "
    "with the standard error for fixed sets. The test set stays one set, with as many rows as all "
    "validation sets together.",
    "log_throughput": "Log the useful TFLOP/s per GPU. The count includes the layers at all "
    "positions, except for padding that is not predicted and for positions after the end of a row, "
    "the pairs of positions that attend to each other, and the logits at masked positions. Blocks "
    "count with the clean copies of their tokens; tokens/s do not.",
    "seed": "Seed of Megatron's random numbers, and of masking rates and masks. The last two are "
    "functions of the seed and the row number.",
}

# Defaults that the objective needs. With --calculate-per-token-loss gradients are summed and
# divided by the global count of eligible tokens (or rows). Without a persistent worker Megatron
# turns --async-save off. The strategy `mcore` uses Megatron's own worker, which needs no other
# library.
NEEDED = {
    "calculate_per_token_loss": True,
    "use_persistent_ckpt_worker": True,
    "async_strategy": "mcore",
}

# Titles of our groups of flags in --help.
TITLE = "masked diffusion: {}"

# Megatron flags, with the value at which all micro-batches must have logits of the same shape.
FIXED_SHAPES = {"cuda_graph_impl": "full_iteration", "defer_embedding_wgrad_compute": True}


class _FlagFactory(ArgumentGroupFactory):
    """Megatron's factory of flags, which adds our prefix to the names of `MDMConfig`'s fields.

    The help of every flag ends with its default.
    """

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return super()._format_arg_name(destination(config_attr_name), prefix)

    def _build_argparse_kwargs_from_field(self, attribute: Field) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        if attribute.default is True:
            text = self.field_docstrings[attribute.name]
            default = f" Default: {text[0].lower()}{text[1:]}"
        elif attribute.default is False:
            default = " Default: off."
        else:  # if the default is None, the field's text describes it in words
            default = "" if attribute.default is None else " Default: %(default)s."
        if "type" in kwargs and "choices" not in kwargs:
            kwargs.setdefault("metavar", {int: "N", float: "X"}.get(kwargs["type"]))
        return {
            **kwargs,
            "dest": destination(attribute.name),
            "help": kwargs["help"] + default,
        }

    def add_to(self, parser: ArgumentParser) -> None:
        """Adds a group of flags for each of the sections."""
        for title, names in SECTIONS.items():
            self.exclude = {x.name for x in fields(self.src_cfg_class) if x.name not in names}
            self.build_group(parser, TITLE.format(title)).description = None


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds the flags of `MDMConfig`; Megatron's `extra_args_provider`.

    It also sets the defaults of Megatron's flags that the objective, the installed libraries and
    the device need.
    """
    _FlagFactory(MDMConfig).add_to(parser)
    set_recipe_defaults(parser)
    parser.set_defaults(**NEEDED)
    for name, libraries in FUSED_BY.items():
        if not any(library.is_installed() for library in libraries):
            parser.set_defaults(**{name: False})
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    _escape_help(parser)
    _describe_layers_after_parsing(parser)
    if requested_device() == "cpu":
        parser.set_defaults(**CPU_DEFAULTS)
    return parser


def _escape_help(parser: ArgumentParser) -> None:
    """Escapes a bare % in Megatron's help texts, which would make --help fail."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError):
            action.help = (action.help or "").replace("%", "%%")


def _describe_layers_after_parsing(parser: ArgumentParser) -> None:
    """Makes the parser replace --num-layers by a pattern if --mdm-model hybrid asks for it.

    Megatron offers no hook between its parsing and its validation, which derives values from the
    pattern.
    """
    parse_known_args = parser.parse_known_args

    def parse(*words: Any, **options: Any) -> tuple[Namespace, list[str]]:
        args, rest = parse_known_args(*words, **options)
        try:
            describe_layers(args)
        except UserError:
            raise
        except (AssertionError, ValueError) as error:
            raise to_user_error(error) from error
        return args, rest

    parser.parse_known_args = parse  # type: ignore[method-assign,assignment]


def parse() -> Namespace:
    """Parses and validates sys.argv as Megatron does; each refused flag gives one clear line.

    Afterwards Megatron's globals are set, and the arguments hold resolved values such as the id of
    the mask token and the window of the strata. A checkpoint thus records the values in use.

    Raises:
        UserError: a flag or a combination of flags cannot work.
    """
    # Megatron validates with assertions and also builds the tokenizer, so our checks come first.
    given = parse_only()
    validate_flags(given)
    if given.use_checkpoint_args:
        check_checkpoints(given)
    check_tokenizer_path(given)
    try:
        with checkpoints_bring_tokenizers():
            args = parse_and_validate_args(add_arguments)
    except UserError:
        raise
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        line = _log_rejection(error, given.tensorboard_dir) or tokenizer_rejection(error, given)
        raise line or to_user_error(error) from error
    return finalize_args(args)


def parse_only() -> Namespace:
    """Parses sys.argv; combinations of flags are not checked.

    Raises:
        UserError: a flag does not exist, or its value has another type.
    """
    # With --yaml-cfg Megatron replaces all flags by the file's settings while it parses.
    if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv[1:]):
        raise _refused_flag_error("yaml_cfg")
    return parse_args(_quiet_parser)


def to_user_error(error: Exception) -> UserError:
    """One line for an exception with which Megatron rejects its flags."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split()) or where.line
    return UserError(f"Megatron rejects these flags or their files: {reason}")


def _log_rejection(error: Exception, directory: str | None) -> UserError | None:
    """One line for an exception about the log directory, which only the last rank creates."""
    if not directory or not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    own, other = os.path.abspath(directory), os.path.abspath(error.filename)
    if os.path.commonpath([own, other]) not in (own, other):
        return None
    return UserError(f"--tensorboard-dir {directory} cannot be written: {error.strerror or error}")


@contextmanager
def megatron_errors_as_user_errors() -> Iterator[None]:
    """Context that turns Megatron's own errors about flags into one line while it builds the model.

    Exceptions from other code, including ours, are bugs and keep their traceback.
    """
    try:
        yield
    except (AssertionError, NotImplementedError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, UserError) or f"{os.sep}megatron{os.sep}" not in where:
            raise
        raise to_user_error(error) from error


def _quiet_parser(parser: ArgumentParser) -> ArgumentParser:
    """Adds our flags and our introduction; reports a wrong flag in one line, without the usage."""

    def error(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all flags)")

    parser.error = error  # type: ignore[method-assign]  # the parser is Megatron's
    # Megatron's own usage names a thousand flags, and its description no program.
    parser.usage = "torchrun [torchrun's flags] -m MODULE [flags]"
    parser.description = sys.modules["__main__"].__doc__
    parser.formatter_class = RawDescriptionHelpFormatter
    return add_arguments(parser)


def finalize_args(args: Namespace) -> Namespace:
    """Sets arguments that depend on the tokenizer and the batch size, and checks a resume.

    In your own script, call it on the result of `parse_and_validate_args`.

    Only the first rank sets `mdm_data` and `mdm_tokenizer`. On other ranks they stay None until the
    datasets set them by a collective call (`share_identities`), when the ranks are connected.

    Args:
        args: arguments of the run; changed in place.

    Returns:
        The same arguments.

    Raises:
        UserError: a mask token or an end-of-document token is missing, objective flags differ from
            the checkpoint's, or flags, data and checkpoint do not fit each other.
    """
    # With --validation-set-names Megatron requires --multiple-validation-sets, and then runs one
    # evaluation per set. Here one evaluation goes through all sets.
    args.mdm_validation_sets, args.validation_set_names = args.validation_set_names, None
    args.eval_iters *= len(args.mdm_validation_sets or [None])
    validate_flags(args)
    args.eval_iters *= len(MDMConfig.from_args(args).evaluated_sizes)
    if args.mdm_recipe:
        notice(f"--mdm-recipe {args.mdm_recipe}: {expansion(args)}")
    line = bound_in_words(MDMConfig.from_args(args))
    if line is not None and not args.skip_train:
        notice(line)
    _demand_fused_attention(args)
    args.mdm_model = model_class(vars(args))
    args.mdm_rate_per = MDMConfig.from_args(args).rate_unit
    start = choose_start(args)
    vars(args).update(start.arguments)
    source, saved = start.source, start.saved
    if saved:
        saved, line = complete(saved)
        if line:
            notice(line)
    check_model(args, saved, source)
    if args.finetune and saved and args.mdm_model != model_class(saved):
        args.no_load_optim = True  # Megatron would load it into a HybridModel, not into a GPTModel
    args.mdm_mask_token_id = _mask_token_id(args)
    args.mdm_vocab_size = vocabulary_size(args, get_tokenizer(), saved, source)
    if args.mdm_quantiles == "strata":
        args.mdm_strata_window = args.mdm_strata_window or args.global_batch_size
        draws = max(1, args.mdm_strata_window // args.mdm_views)
        args.mdm_strata = args.mdm_strata or max(1, round(draws**0.5))
        MDMConfig.from_args(args)
        if args.mdm_strata_window % args.mdm_views:
            raise UserError(
                f"--mdm-strata-window {args.mdm_strata_window} is not a multiple of --mdm-views "
                f"{args.mdm_views}"
            )
        if args.mdm_strata > args.mdm_strata_window // args.mdm_views:
            raise UserError(
                f"--mdm-strata {args.mdm_strata} exceeds the data rows in a window of "
                f"{args.mdm_strata_window} rows with --mdm-views {args.mdm_views}"
            )
    for name in ("mdm_isad_token_ids", "mdm_syrm_token_ids"):
        for token in getattr(args, name) or ():
            if 0 <= token < args.mdm_vocab_size:
                continue
            raise UserError(
                f"{flag(name)} {token} lies outside the vocabulary of {args.mdm_vocab_size}: "
                "give ids of the tokenizer"
            )
    check_scales(args, saved, source)
    if source is not None:
        check_tokenizer(args, saved, source, get_tokenizer())
    vars(args).update(plan_resume(args, saved).arguments())
    check_optimizer_state(args, saved)
    args.mdm_data, args.mdm_tokenizer = check_data(args)
    if args.eval_iters and not args.mock_data:
        check_validation(args.eval_iters, args.split, get_blend_and_blend_per_split(args)[1])
    check_same_data(args, saved)
    return args


def _demand_fused_attention(args: Namespace) -> None:
    """Makes Transformer Engine stop where it has no fused kernel for the attention of blocks.

    Its own choice would be the unfused attention, silently, with scores of quadratic size.
    """
    if MDMConfig.from_args(args).blocks is None or args.transformer_impl != "transformer_engine":
        return
    if args.attention_backend == AttnBackend.auto:
        args.attention_backend = AttnBackend.fused
        notice("blocks with Transformer Engine: --attention-backend fused")


def check_data(args: Namespace) -> Identities:
    """Checks the files that --data-path and similar flags name.

    Returns:
        The identities of the files and of the tokenizer, which checkpoints record.

    Raises:
        UserError: a file is missing or damaged, was made with another tokenizer, or holds pairs
            without --mdm-sft; or its documents lack the end-of-document token that a flag needs; or
            the names of validation sets do not match their files.
    """
    _check_end_of_document(args)
    names = getattr(args, "mdm_validation_sets", None)
    if args.mock_data:
        check_validation_sets(names, None)
        if args.mdm_sft:
            raise UserError("--mdm-sft has no --mock-data: give pairs with --data-path")
        return identities(args, None, None, get_tokenizer())
    check_split(args.split)
    try:
        blend, parts = get_blend_and_blend_per_split(args)
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(f"Megatron rejects the data flags or their files: {error}") from error
    check_validation_sets(names, parts)
    check_data_files(blend, parts)
    if not args.mdm_sft:
        check_single_texts(blend, parts)
    found = identities(args, blend, parts, get_tokenizer())
    divided = args.mdm_isolate_documents or args.mdm_rate_per == "document"
    if divided and not args.mdm_sft:  # rows of pairs record where each pair ends
        check_ends_of_documents(blend, parts, get_tokenizer().eod)
    return found


def _check_end_of_document(args: Namespace) -> None:
    """Checks that the tokenizer has an end-of-document token if a flag needs one."""
    if tokenizer_end_id(get_tokenizer()) is not None:
        return
    needed_by = {
        "--mdm-isolate-documents": args.mdm_isolate_documents,
        "--mdm-rate-per document": args.mdm_rate_per == "document",
        "--no-mdm-eod-eligible": not args.mdm_eod_eligible,
        "--no-mdm-eod-attended": not args.mdm_eod_attended,
        "--mdm-sft": args.mdm_sft,
    }
    for name, is_needed in needed_by.items():
        if is_needed:
            raise UserError(
                f"{name} needs an end-of-document token, and the tokenizer "
                f"{args.tokenizer_model or args.tokenizer_type} has none (eos): leave it out, or "
                "give the tokenizer one and run tools/preprocess_data.py again"
            )


def validate_flags(args: Namespace) -> None:
    """Checks parsed arguments, before Megatron validates them or after.

    Raises:
        UserError: names the flag and what to do.
    """
    try:
        _validate_flags(args)
    except UserError as error:
        named = set(re.findall(r"--[\w-]+", str(error)))
        if named.isdisjoint(map(flag_of, RECIPES.get(args.mdm_recipe, ()))):
            raise
        raise UserError(f"{error} (--mdm-recipe {args.mdm_recipe}: {expansion(args)})") from error


def _validate_flags(args: Namespace) -> None:
    mdm = MDMConfig.from_args(args)
    _check_log_directory(args.tensorboard_dir)
    for name in REFUSED:
        if getattr(args, name):
            raise _refused_flag_error(name)
    if args.dataloader_type not in (None, "single"):
        raise UserError(
            f"--dataloader-type {args.dataloader_type} renumbers the rows, which their masks "
            "depend on: use --dataloader-type single"
        )
    if mdm.blocks is not None:
        _check_blocks(args, mdm.blocks)
    if args.context_parallel_size > 1:
        _check_context_parallel(args, mdm)
    has_no_window = args.mdm_quantiles == "strata" and args.mdm_strata_window is None
    if has_no_window and args.step_batch_size_schedule:
        raise UserError(
            "--mdm-quantiles strata with --step-batch-size-schedule has no fixed global batch to "
            "stratify over: give --mdm-strata-window"
        )
    if args.step_batch_size_schedule and args.eval_iters and args.eval_global_batch_size is None:
        raise UserError(
            "--step-batch-size-schedule leaves the number of validation rows to the layout: give "
            "--eval-global-batch-size"
        )
    if args.global_batch_size is None and not args.step_batch_size_schedule:
        raise UserError("--global-batch-size is missing: rows in one step, over all ranks")
    if args.mdm_head == "masked":
        for name, value in FIXED_SHAPES.items():
            if getattr(args, name) == value:
                raise UserError(
                    f"{flag(name)} needs logits of one shape, but the number of masked positions "
                    "changes with every micro-batch: add --mdm-head full"
                )
    if mdm.confidence_loss and args.cross_entropy_loss_fusion:
        raise UserError(
            "--mdm-confidence-loss does not go with --cross-entropy-loss-fusion, which keeps no "
            "probabilities that its entropies could use: leave one of them out"
        )
    if args.log_throughput:
        for name in UNKNOWN:
            if getattr(args, name):
                raise UserError(
                    f"--log-throughput does not count {flag(name)}: leave one of them out"
                )
    # For these modules Megatron reads Transformer Engine's FP8 state, even without FP8.
    for module in {"layernorm", "moe_act"} & set(args.recompute_modules or ()):
        if args.transformer_impl == "local":
            raise UserError(
                f"--recompute-modules {module} needs --transformer-impl transformer_engine: leave "
                "it out"
            )
    check_model_class(args)
    if args.num_experts:
        check_experts(args)
    if args.use_distributed_optimizer and args.optimizer == "sgd":
        raise UserError(
            "--optimizer sgd has no state that --use-distributed-optimizer could divide among "
            "ranks: leave one of them out"
        )
    if args.mdm_ppots_refit_interval and args.ckpt_format != "torch_dist":
        raise UserError(
            f"--ckpt-format {args.ckpt_format} does not save the measurements of "
            "--mdm-ppots-refit-interval: use torch_dist"
        )
    _check_transformer_engine(args, mdm)
    check_data_flags(args)
    check_schedule(args)
    check_sizes(args)


def _check_log_directory(directory: str | None) -> None:
    """Checks --tensorboard-dir on all ranks; otherwise only the last rank would find an error."""
    path = directory or ""
    while path and not os.path.lexists(path):
        path = os.path.dirname(path)
    if path and not os.path.isdir(path):
        raise UserError(
            f"--tensorboard-dir {directory} cannot be made: {path} is no directory; give another "
            "one"
        )


def _refused_flag_error(name: str) -> UserError:
    return UserError(f"{flag(name)} cannot be used with masked diffusion: {REFUSED[name]}")


def _flag_of_blocks(args: Namespace) -> str:
    """The flag that gives the sizes of blocks."""
    is_schedule = args.mdm_block_size_schedule is not None
    return "--mdm-block-size-schedule" if is_schedule else "--mdm-block-size"


def _check_blocks(args: Namespace, blocks: BlockSchedule) -> None:
    """Checks flags that do not go with blocks, and the sizes of blocks."""
    flag_of_blocks = _flag_of_blocks(args)
    for size in (*blocks.sizes, *MDMConfig.from_args(args).evaluated_sizes):
        if size is not None and size > (args.seq_length or size):
            raise UserError(
                f"{flag_of_blocks}: a block of {size} tokens is longer than a row of --seq-length "
                f"{args.seq_length}; use `row` in a schedule, or leave the flag out"
            )
    if args.tp_comm_overlap:
        raise UserError(
            f"{flag_of_blocks} does not go with --tp-comm-overlap, whose buffers hold one position "
            "for each token: leave it out"
        )
    dispatcher = args.moe_flex_dispatcher_backend
    if args.moe_token_dispatcher_type == "flex" and dispatcher != "deepep":
        raise UserError(
            f"{flag_of_blocks} does not go with --moe-flex-dispatcher-backend {dispatcher}, whose "
            "buffers keep the number of positions of the first step: use deepep"
        )
    if args.cuda_graph_impl not in (None, "none"):
        raise UserError(
            f"{flag_of_blocks} does not go with --cuda-graph-impl {args.cuda_graph_impl}, which "
            "needs one number of positions: leave it out"
        )


def check_positions_of_blocks(args: Namespace, flag_of_blocks: str) -> None:
    """Checks that attention can number the copies of a token as one position.

    Args:
        args: arguments of the model, in training or in a checkpoint.
        flag_of_blocks: the flag that asks for blocks.

    Raises:
        UserError: it cannot.
    """
    if args.multi_latent_attention:
        raise UserError(
            f"{flag_of_blocks} does not go with --multi-latent-attention, which numbers the copies "
            f"of a token as different positions: leave out {flag_of_blocks}"
        )


def _check_attention_of_blocks(args: Namespace) -> None:
    """Checks the flags of Transformer Engine's attention, which takes the mask as a bias."""
    flag_of_blocks = _flag_of_blocks(args)
    check_positions_of_blocks(args, flag_of_blocks)
    if args.attention_backend == AttnBackend.flash:
        raise UserError(
            f"{flag_of_blocks} does not go with --attention-backend flash, which takes no mask: "
            "leave it out"
        )
    if args.attention_backend != AttnBackend.unfused and not (args.bf16 or args.fp16):
        raise UserError(
            f"{flag_of_blocks} with --transformer-impl transformer_engine needs --bf16 or --fp16, "
            "because the fused kernel has no float32: add one, or --attention-backend unfused"
        )
    others = {*args.cp_comm_type} - {"p2p"}
    if args.context_parallel_size > 1 and others:
        raise UserError(
            f"{flag_of_blocks} does not go with --cp-comm-type {' '.join(sorted(others))}, which "
            "takes no mask: use p2p"
        )
    if getattr(args, "fp8_dot_product_attention", False):
        raise UserError(
            f"{flag_of_blocks} does not go with attention in FP8, which takes no mask: leave out "
            "fp8_dot_product_attention; the linear layers may use --fp8-format"
        )


def _check_context_parallel(args: Namespace, mdm: MDMConfig) -> None:
    # A rehearsal (--fake-process-group) has no other ranks, and brings an attention of its own.
    if args.transformer_impl == "local" and not args.fake_process_group:
        raise UserError(
            "--context-parallel-size above 1 needs --transformer-impl transformer_engine: with "
            "Megatron's local attention a position sees only its own rank's part of the row"
        )
    if mdm.has_whole_rows and not mdm.whole_rows_attend_everywhere:
        rows = "rows" if mdm.blocks is None else "the whole rows of a schedule or an evaluation"
        raise UserError(
            f"--context-parallel-size above 1 cuts {rows} without regard to documents and "
            "lengths: leave out --mdm-isolate-documents and every other flag that limits attention"
        )


def _check_transformer_engine(args: Namespace, mdm: MDMConfig) -> None:
    if not TRANSFORMER_ENGINE.is_installed():
        for name in ("fp8", "fp4"):
            if getattr(args, name):
                raise UserError(
                    f"--{name}-format needs Transformer Engine, which is not installed (Megatron "
                    "would silently ignore the flag): README.md (section Install) says how to "
                    "install it"
                )
        if args.transformer_impl == "transformer_engine":
            raise UserError(
                "--transformer-impl transformer_engine needs Transformer Engine, which is not "
                "installed: install it (README.md, section Install), or use --transformer-impl "
                "local"
            )
    elif args.fp8 or args.fp4 or args.transformer_impl == "transformer_engine":
        recipe = f"--fp8-recipe {args.fp8_recipe}" if args.fp8 else ""
        warning = check_transformer_engine([recipe, "--fp4-format" if args.fp4 else ""])
        if warning:
            notice(warning, sys.stderr)
    check_fp8(args)
    _check_flags_of_engine(args, mdm)


def check_flags_of_gpus(args: Namespace) -> None:
    """Checks the flags that layers on a GPU read, without a GPU and its libraries.

    Args:
        args: parsed arguments of a run on GPUs, which Megatron has not validated.

    Raises:
        UserError: a flag or a combination of flags cannot work there.
    """
    check_model_class(args)
    _check_flags_of_engine(args, MDMConfig.from_args(args))
    check_fp8_flags(args)


def _check_flags_of_engine(args: Namespace, mdm: MDMConfig) -> None:
    if args.transformer_impl == "transformer_engine":
        if mdm.blocks is not None:
            _check_attention_of_blocks(args)
        if not (args.mdm_pad_attended and args.mdm_eod_attended):
            raise UserError(
                "--no-mdm-pad-attended and --no-mdm-eod-attended work with --transformer-impl "
                "local only: Transformer Engine reads a padding mask as the length of a row"
            )
        if mdm.divides_rows and args.cuda_graph_impl not in (None, "none"):
            raise UserError(
                f"--cuda-graph-impl {args.cuda_graph_impl} needs fixed shapes, but the number of "
                "documents changes: leave it out, or leave out --mdm-isolate-documents and "
                "--mdm-random-length-fraction"
            )
        if args.mdm_anneal_attention_iters:
            raise UserError(
                "--mdm-anneal-attention-iters works with --transformer-impl local only: its "
                "attention mask has no fused kernel"
            )
    elif args.multi_latent_attention:
        raise UserError(
            "--multi-latent-attention needs --transformer-impl transformer_engine: leave it out"
        )
    if args.transformer_impl == "inference_optimized":
        raise UserError(
            "--transformer-impl inference_optimized cannot train: use transformer_engine or local"
        )


def _mask_token_id(args: Namespace) -> int:
    """The mask token id from the flag, else from the tokenizer, checked against the vocabulary."""
    mask = args.mdm_mask_token_id
    if mask is None:
        mask = tokenizer_mask_id(get_tokenizer())
    if mask is None:
        raise UserError(
            f"the tokenizer {args.tokenizer_model or args.tokenizer_type} has no mask piece: give "
            "--mdm-mask-token-id, or train one with tools/train_tokenizer.py"
        )
    if not 0 <= mask < args.padded_vocab_size:
        raise UserError(
            f"--mdm-mask-token-id {mask} lies outside the vocabulary of {args.padded_vocab_size} "
            "(padding included): choose a smaller id, or enlarge --make-vocab-size-divisible-by"
        )
    return mask
