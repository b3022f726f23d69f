"""Parts of config.json that all families share: types of values, and the rotary embedding."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mdm.errors import UserError

Config = Mapping[str, Any]


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _each(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


# Type in words -> the function that checks it, and the keys that have it. A null value counts as
# a missing key.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a text": (_is_a(str), "model_type torch_dtype dtype"),
    "a list of texts": (_each(_is_a(str)), "architectures layer_types"),
    "a whole number above 0": (
        is_count,
        "vocab_size embedding_size mdm_block_size block_size bd_size",
    ),
    "the id of a token": (_is_a(int), "mask_token_id"),
    "true or false": (_is_a(bool), "tie_word_embeddings weight_tying mdm_shift"),
    "'clean' or 'noisy'": (lambda value: value in ("clean", "noisy"), "mdm_shift_first"),
    "an object": (_is_a(dict), "rope_scaling rope_parameters auto_map"),
}


def check_kinds(config: Config) -> None:
    """Checks that values of config.json have the types that the code relies on.

    Raises:
        UserError: a value has another type.
    """
    for kind, (check, keys) in _KINDS.items():
        for key in keys.split():
            if config.get(key) is not None and not check(config[key]):
                raise wrong_kind(key, kind, config[key])


def wrong_kind(key: str, kind: str, value: object) -> UserError:
    """Returns the error about a value of the wrong type."""
    return UserError(f"config.json: {key!r} should be {kind}, got {value!r}")


def rotary_base(config: Config) -> Any:
    """Returns the base of the rotary embedding (theta), None if config.json does not give it.

    Raises:
        UserError: config.json gives two different bases, or a rotation that Megatron does not
            compute.
    """
    values = [config.get("rope_theta"), _rotary(config).get("rope_theta")]
    given = [value for value in values if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(
            f"config.json: 'rope_theta' is {given[0]!r} and, in 'rope_parameters' or "
            f"'rope_scaling', {given[1]!r}: versions of transformers take one or the other; keep "
            "the one that the model was trained with"
        )
    return given[0] if given else None


def rotary_share(config: Config) -> Any:
    """Returns the share of a head's channels that are rotated, None if config.json has none.

    Raises:
        UserError: config.json gives two different shares.
    """
    key = "partial_rotary_factor"
    given = [where[key] for where in (config, _rotary(config)) if where.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(
            f"config.json: {key!r} is {given[0]!r} and, in 'rope_parameters' or 'rope_scaling', "
            f"{given[1]!r}: keep the one that the model was trained with"
        )
    return given[0] if given else None


def rope_scaling_flags(config: Config) -> list[str]:
    """Returns Megatron's flags for Llama 3.1's rope scaling; only its factor has a flag.

    The other parameters are constants in Megatron.

    Raises:
        UserError: config.json asks for another scaling.
    """
    scaling = _rotary(config)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return []
    built_in = {
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    # transformers prefers a length at the top level of config.json to one in the scaling.
    length = config.get("original_max_position_embeddings", 8192)
    if (
        kind != "llama3"
        or length != 8192
        or any(scaling.get(key) != value for key, value in built_in.items())
    ):
        raise UserError(
            f"config.json: rope scaling {dict(scaling)} is not supported: Megatron only computes "
            f"llama3 with {built_in}"
        )
    if not is_positive(scaling.get("factor")):
        raise wrong_kind("factor", "a number above 0 in the rope scaling", scaling.get("factor"))
    return ["--use-rope-scaling", "--rope-scaling-factor", str(scaling["factor"])]


def _rotary(config: Config) -> Config:
    """Returns the settings of the rotary embedding, under transformers 4's or 5's key."""
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters and scaling != parameters:
        raise UserError(
            "config.json: 'rope_scaling' and 'rope_parameters' differ: keep the one that the model "
            "was trained with"
        )
    settings: Config = scaling or parameters
    if any(isinstance(value, dict) for value in settings.values()):
        raise UserError(
            f"config.json: rotary embeddings that differ between layers, {dict(settings)}, are not "
            "supported"
        )
    return settings
