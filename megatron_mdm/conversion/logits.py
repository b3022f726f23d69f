"""What the model of a directory computes, by Hugging Face's class and by Megatron's."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.conversion import megatron_model
from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.family import Family, model_flags
from megatron_mdm.conversion.modeling_code import WORKS_WITH, class_name, model_of
from megatron_mdm.conversion.vocabulary import TENSORS
from megatron_mdm.errors import UserError

# Weights in float32, of which there are two sets while the logits are compared.
MAX_BYTES = 4 * 10**9
# Of the largest logit. Rounding alone gives some 1e-6; wrong arrangements change all digits.
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
    added: int | None = None,
) -> None:
    """Compares the logits of both models, read from their files, in float32 with full attention.

    Says what was compared, or why nothing was.

    Args:
        family: the table.
        config: config.json.
        hub_directory: with the Hugging Face model.
        checkpoint: directory with the files of one iteration.
        rows: tokens that both models have.
        padded: rows of Megatron's vocabulary.
        parameters: of the model.
        dtype: that was written, and to which the weights of both are rounded; None for the same
            on both sides.
        trust: run the modeling code of the directory.
        log: prints a line for the user.
        added: a token whose rows only Megatron's model has; it is left out.

    Raises:
        UserError: they differ by more than `TOLERANCE` of the largest.
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
        except Exception as error:  # whatever code of the directory may raise
            first = str(error).strip().partition("\n")[0]
            reason = f"Hugging Face's class does not load: {type(error).__name__}: {first}"
            reason += _advice(family)
    if reason:
        log(f"did not compare logits: {reason}")
        return
    flags = [*model_flags(family, config), "--padded-vocab-size", str(padded)]
    flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(rows)]
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
    """Why Hugging Face's class cannot be built, empty if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    if family.in_transformers:
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
    """Which version of transformers the code of a family was written for."""
    import transformers

    if family.in_transformers or transformers.__version__ == WORKS_WITH:
        return ""
    return (
        f" (transformers is {transformers.__version__}; the published code was written for "
        f"{WORKS_WITH}: in an environment of its own, pip install 'transformers=={WORKS_WITH}')"
    )


@torch.no_grad()
def _hub_logits(
    family: Family,
    config: Config,
    directory: Path,
    tokens: torch.Tensor,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Logits [b, s, vocabulary] of Hugging Face's class, float32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    inputs: dict[str, Any] = {}
    if family.in_transformers:  # a causal model, whose mask is added to the scores: none is hidden
        inputs["attention_mask"] = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
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
