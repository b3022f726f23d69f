"""Checks the layers in --hybrid-layer-pattern."""

from megatron_mdm.errors import UserError

# Megatron's layers other than `*`, `-` and `E`, and the reason why they cannot be used.
REFUSED_LAYERS = {
    "M": "a Mamba layer, which is causal",
    "G": "a gated delta net, which is causal",
    "D": "sparse attention with an indexer, which is causal",
    "+": "multi-latent attention, which is not supported",
    "/": "the beginning of multi-token prediction, which is causal",
}


def check_pattern(pattern: str, num_experts: int | None) -> None:
    """Checks --hybrid-layer-pattern.

    Raises:
        UserError: names the symbol of a layer that cannot be used, or --num-experts is missing.
    """
    for symbol in pattern:
        if symbol not in "*-E|":
            what = REFUSED_LAYERS.get(symbol, "not a layer of Megatron's")
            raise UserError(
                f"--hybrid-layer-pattern {pattern}: {symbol} is {what}; use * (attention), - (MLP) "
                "and E (mixture of experts), with | between pipeline stages"
            )
    if "E" in pattern and not num_experts:
        raise UserError(f"--hybrid-layer-pattern {pattern} needs --num-experts for its E layers")
