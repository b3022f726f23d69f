"""Changes the flags of a launch so that one CPU process can play any of its ranks."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mdm.errors import UserError

# Beginnings of flags that need a GPU, its libraries or Transformer Engine, or that write files.
TAKEN_OUT = """
--attention-backend --cpu-offload --cross-entropy- --cuda-graph --delay-wgrad-compute
--deterministic-mode --distributed-backend --distrib-optim-fully-reshardable-mem-efficient
--enable-cuda-graph --enable-ft-package --enable-gloo-process-groups --enable-one-logger
--external-cuda-graph --fake-process-group --fine-grained-activation-offloading
--first-last-layers-bf16
--fp4 --fp8 --high-priority-stream-groups --log-progress --mdm-device --memory-snapshot-path
--moe-flex-dispatcher --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion
--moe-token-dispatcher-type --nccl --num-layers-at-end-in-bf16 --num-layers-at-start-in-bf16
--num-workers --offload --optimizer-cpu-offload --overlap-param-gather-with-optimizer-step --profile
--record-memory-history --result-rejected-tracker-filename --sharp --te- --tensorboard
--tp-comm --transformer-impl --use-flash-attn --use-nccl-ub --use-pytorch-profiler --use-sharp
--use-te- --use-tensorboard --use-transformer-engine --wandb --write-results
""".split()
# Those of them that a CPU run replaces without a loss, so that no line mentions them.
UNMENTIONED = ("--mdm-device", "--num-workers", "--distributed-backend", "--fake-process-group")
# Modules that the local layers cannot recompute.
RECOMPUTED_BY_TE = {"layernorm", "moe_act"}
CPU = ["--mdm-device", "cpu", "--fake-process-group", "--num-workers", "0"]
DATA = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
DATA_LISTS = ("--data-args-path", "--per-split-data-args-path")
SPLITS = ("--split", "--validation-set-names")
TOKENIZERS = ("--tokenizer-model", "--vocab-file", "--merge-file")
# All flags about data and tokenizer.
INPUTS = {
    *DATA,
    *DATA_LISTS,
    *SPLITS,
    *TOKENIZERS,
    *("--tokenizer-type", "--vocab-size", "--null-tokenizer-eod-id"),
    *("--mdm-mask-token-id", "--mock-data"),
}


def flags_and_values(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The flags of a command line, each with its values; a value never begins with `--`.

    Raises:
        UserError: the first word is not a flag.
    """
    current: list[str] = []
    for word in words:
        if not word.startswith("--"):
            if not current:
                raise UserError(f"{word} is not a flag: the flags of the run come after --")
            current.append(word)
            continue
        if current:
            yield current[0], current[1:]
        name, equals, value = word.partition("=")
        current = [name, value] if equals else [name]
    if current:
        yield current[0], current[1:]


def for_a_cpu(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags with which a CPU process plays a rank, and those that it does not rehearse.

    Args:
        words: the flags of the launch.

    Returns:
        The new command line, and the flags that were taken out, with their values.

    Raises:
        UserError: the launch has layers that exist in Transformer Engine only.
    """
    kept: list[str] = []
    left_out: list[str] = []
    for name, values in flags_and_values(words):
        if name == "--multi-latent-attention":
            raise UserError(f"{name} cannot be rehearsed: only Transformer Engine has its layers")
        if name == "--recompute-modules" and RECOMPUTED_BY_TE & {*values}:
            left_out += [name, *(value for value in values if value in RECOMPUTED_BY_TE)]
            values = [value for value in values if value not in RECOMPUTED_BY_TE]
            if not values:
                continue
        if name.startswith(tuple(TAKEN_OUT)):
            left_out += [] if name in UNMENTIONED else [name, *values]
        else:
            kept += [name, *values]
    return [*kept, *CPU], left_out


def without_inputs(words: Sequence[str], vocabulary: int) -> list[str]:
    """The flags with random rows and a tokenizer without files in place of the launch's inputs.

    Args:
        words: the flags of the launch.
        vocabulary: number of ids, the mask token included.
    """
    kept = [
        word
        for name, values in flags_and_values(words)
        if name not in INPUTS
        for word in (name, *values)
    ]
    return [
        *kept,
        *("--mock-data", "--split", "998,1,1", "--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(vocabulary - 1), "--null-tokenizer-eod-id", "0"),
        *("--mdm-mask-token-id", str(vocabulary - 1)),
    ]


def missing_inputs(words: Sequence[str]) -> list[str]:
    """Files and directories that the flags name and that do not exist."""
    missing = []
    for name, values in flags_and_values(words):
        if name in DATA:
            prefixes = [value for value in values if not _is_number(value)]
            paths = [f"{prefix}{end}" for prefix in prefixes for end in (".bin", ".idx")]
        elif name in (*DATA_LISTS, *TOKENIZERS, "--mdm-ppots-file"):
            paths = values
        else:
            continue
        # A name with "://" is in an object storage.
        missing += [f"{name} {p}" for p in paths if "://" not in p and not Path(p).exists()]
    return list(dict.fromkeys(missing))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not os.path.exists(f"{text}.idx")
