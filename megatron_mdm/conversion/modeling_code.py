"""A model of the Python code that lies beside its config.json, in float32.

The code of LLaDA, LLaDA-MoE and Dream was written for transformers 4. `from_pretrained` of
transformers 5 stumbles over it while it loads weights, and so the class is called by itself here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.safetensors_model import HubModel

# The version that the released classes were last published for, and load with as they are.
WORKS_WITH = "4.57.1"


def class_name(config: Config) -> str:
    """The class that a directory's own code has for the model, as module.Class; empty without."""
    names = config.get("auto_map") or {}
    return str(names.get("AutoModelForCausalLM") or names.get("AutoModel") or "")


def model_of(directory: Path, config: Config, same: Sequence[str] = ()) -> Any:
    """The model with the weights of its files; runs the code of the directory.

    Args:
        directory: with config.json, the code and the weights.
        config: config.json.
        same: two names of one tensor, of which the files may lack the second.

    Raises:
        Exception: of any kind, from the code.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    local = {"local_files_only": True}
    with _rotary_embedding_without_scaling():
        settings = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=True, **local
        )
        settings.use_cache = False  # transformers 5 gives no default, and LLaDA's asks for it
        model = get_class_from_dynamic_module(class_name(config), str(directory), **local)(settings)
    missing = _load(model.state_dict(), directory, same)
    if missing:
        raise ValueError(f"it has the tensor {missing[0]}, which the files lack")
    return model


def _load(own: dict[str, torch.Tensor], directory: Path, same: Sequence[str]) -> list[str]:
    """Copies the tensors of a directory into those of a model; returns the names that it lacks.

    By the library of their format, and not by our own reader, which wrote or read them before.
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
    """Context with the entry `default` of transformers' table, which transformers 5 has not.

    LLaDA-MoE's and Dream's code look their frequencies up there.
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
    """Computes the frequencies of the rotary embedding.

    Returns:
        The frequencies, float32 [dimensions of a head / 2], and a factor of the result.
    """
    size = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return config.rope_theta**-exponents, 1.0
