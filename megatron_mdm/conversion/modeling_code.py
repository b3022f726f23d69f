"""Builds a model in float32 from the Python code beside its config.json.

The code of LLaDA, LLaDA-MoE and Dream was written for transformers 4. The `from_pretrained` of
transformers 5 fails when it loads weights into these classes. Therefore this module calls the
class itself and loads the weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.safetensors_model import HubModel


def class_name(config: Config) -> str:
    """Returns the model class of a directory's own code as module.Class; empty if there is none."""
    names = config.get("auto_map") or {}
    return str(names.get("AutoModelForCausalLM") or names.get("AutoModel") or "")


def model_of(directory: Path, config: Config, same: Sequence[str] = ()) -> Any:
    """Builds the model and loads its weights; runs the code of the directory.

    Args:
        directory: directory with config.json, the code and the weights.
        config: content of config.json.
        same: two names of one tensor; the files may lack the second name.

    Raises:
        Exception: the directory's code may raise any exception.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    local = {"local_files_only": True}
    with _rotary_embedding_without_scaling():
        settings = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=True, **local
        )
        settings.use_cache = False  # transformers 5 has no default, and LLaDA's code reads it
        model = get_class_from_dynamic_module(class_name(config), str(directory), **local)(settings)
    missing = _load(model.state_dict(), directory, same)
    if missing:
        raise ValueError(f"it has the tensor {missing[0]}, which the files lack")
    return model


def _load(own: dict[str, torch.Tensor], directory: Path, same: Sequence[str]) -> list[str]:
    """Copies the tensors of a directory into a model; returns the names that the files lack.

    The safetensors library reads them, so that the check does not depend on this package's reader.
    """
    from safetensors import safe_open

    files: dict[Path, list[str]] = {}
    for name, entry in HubModel(directory).entries.items():
        files.setdefault(entry.path, []).append(name)
    missing = set(own)
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                aliases = same if name in same[:1] else [name]
                for alias in missing.intersection(aliases):
                    own[alias].copy_(file.get_tensor(name))
                missing.difference_update(aliases)
    return sorted(missing)


@contextmanager
def _rotary_embedding_without_scaling() -> Iterator[None]:
    """Adds the entry `default` to transformers' table of rotary embeddings inside the context.

    The code of LLaDA-MoE, LLaDA2 and Dream looks the entry up; transformers 5 lacks it.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = "default"
    if name in ROPE_INIT_FUNCTIONS:
        yield
        return
    ROPE_INIT_FUNCTIONS[name] = _frequencies
    try:
        yield
    finally:
        del ROPE_INIT_FUNCTIONS[name]


def _frequencies(
    config: Any, device: torch.device | None = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """Computes the frequencies of a rotary embedding without scaling.

    Returns:
        The frequencies, float32 [rotated channels of a head / 2], and the factor that scales the
        attention.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(size * getattr(config, "partial_rotary_factor", 1))
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return config.rope_theta**-exponents, 1.0
