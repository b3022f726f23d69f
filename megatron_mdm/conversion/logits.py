"""Compares the logits of a model in Hugging Face's class and in Megatron's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.conversion import megatron_model
from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.family import Family, model_flags
from megatron_mdm.conversion.modeling_code import class_name, model_of
from megatron_mdm.conversion.vocabulary import TENSORS
from megatron_mdm.errors import UserError
from megatron_mdm.libraries import RELEASED_CODE_RUNS_WITH, TRANSFORMERS

# Upper limit of the float32 weights of one model. Both models are in memory during the comparison.
MAX_BYTES = 4 * 10**9
# Relative to the largest logit. Rounding gives about 1e-6; a wrong tensor layout gives about 1.
TOLERANCE = 1e-4
ROWS, LENGTH = 2, 16


def compare_logits(
    family: Family,
    config: Config,
    hub_directory: Path,
    checkpoint: Path,
    rows: int,
    *,
    padded: int,
    parameters: int,
    dtype: torch.dtype | None,
    trust: bool,
    log: Callable[[str], object],
    model: str,
    added: int | None = None,
) -> None:
    """Compares the logits of both models in float32 with full attention, from their files.

    Logs what was compared, or why nothing was compared.

    Args:
        family: the model family.
        config: content of config.json.
        hub_directory: directory of the Hugging Face model.
        checkpoint: directory with the files of one iteration.
        rows: number of tokens that both models have.
        padded: rows of Megatron's vocabulary.
        parameters: number of the model's parameters.
        dtype: dtype of the written weights; the weights of both models are rounded to it. None:
            both have the same dtype, and no weights are rounded.
        trust: run the modeling code of the directory.
        log: prints a line for the user.
        model: class of Megatron's model, `gpt` or `hybrid`.
        added: a token that only Megatron's model has, which is not compared; None: there is none.

    Raises:
        UserError: the logits differ by more than `TOLERANCE` times the largest logit.
    """
    reason = _obstacle(family, config, hub_directory, trust)
    if 4 * parameters > MAX_BYTES:
        reason = (
            f"the weights take {4 * parameters / 1e9:.1f} GB in float32, more than "
            f"{MAX_BYTES / 1e9:.0f} GB"
        )
    length = min(LENGTH, family.value(config, "max_position_embeddings"))
    known = torch.tensor([token for token in range(rows) if token != added])
    generator = torch.Generator().manual_seed(0)
    tokens = known[torch.randint(len(known), (ROWS, length), generator=generator)]
    if not reason:
        try:
            theirs = _hub_logits(family, config, hub_directory, tokens, dtype)
        except Exception as error:  # the directory's code may raise anything
            first = str(error).strip().partition("\n")[0]
            reason = f"Hugging Face's class does not load: {type(error).__name__}: {first}"
            reason += _advice(family)
    if reason:
        log(f"did not compare logits: {reason}")
        return
    flags = [*model_flags(family, config), "--padded-vocab-size", str(padded)]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows)]
    flags += ["--mdm-model", model]
    ours = megatron_model.logits(flags, checkpoint, tokens, dtype)
    difference = (ours[..., known] - theirs[..., known]).abs().max().item()
    largest = theirs[..., known].abs().max().item()
    seen = (
        f"logits of {ROWS} rows of {length} random tokens in float32, full attention, both models "
        f"from their files: largest difference {difference:.1e} of logits up to {largest:.2g} "
        f"(tolerance {TOLERANCE:.0e} of them)"
    )
    if not difference <= TOLERANCE * largest:  # NaN too
        raise UserError(f"--verify: {seen}: the models differ, nothing was kept")
    log(f"verified: {seen}")


def _obstacle(family: Family, config: Config, directory: Path, trust: bool) -> str:
    """Returns why Hugging Face's class cannot be built, or an empty text."""
    if not TRANSFORMERS.is_installed():
        return f"transformers is not installed ({TRANSFORMERS.install})"
    if family.transformers_class:
        return ""
    name = class_name(config)
    # A name with "--" would be fetched from the network.
    if not name or "--" in name or not (directory / f"{name.partition('.')[0]}.py").is_file():
        return (
            f"transformers has no class for {family.name}, and no modeling code lies beside its "
            "config.json"
        )
    if not trust:
        return f"add --trust-remote-code to run {name.partition('.')[0]}.py beside its config.json"
    return ""


def _advice(family: Family) -> str:
    """Names the transformers version that a family's code was written for, if another is used."""
    import transformers

    if family.transformers_class or transformers.__version__ == RELEASED_CODE_RUNS_WITH:
        return ""
    return (
        f" (transformers is {transformers.__version__}; the published code was written for "
        f"{RELEASED_CODE_RUNS_WITH}: in an environment of its own, pip install "
        f"'transformers=={RELEASED_CODE_RUNS_WITH}')"
    )


@torch.no_grad()
def _hub_logits(
    family: Family,
    config: Config,
    directory: Path,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Computes the logits of Hugging Face's class, float32 [b, s, vocabulary]."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    inputs: dict[str, Any] = {}
    if family.transformers_class:  # a causal model: a mask of zeros hides no position
        inputs["attention_mask"] = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        model: Any = getattr(transformers, family.transformers_class).from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        )
    else:
        ((embedding,), (output,)) = (family.tensors[name] for name in TENSORS)
        model = model_of(directory, config, (embedding, output) if family.tied(config) else ())
    megatron_model.round_weights(model, dtype)
    logits: torch.Tensor = model.eval()(tokens, **inputs).logits
    return logits.float()
