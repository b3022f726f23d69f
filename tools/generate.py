"""Writes text with a trained checkpoint.

    python tools/generate.py --load runs/quickstart/checkpoint --device cpu --prompt "def "

Under torchrun the ranks share the model as tensor-parallel ranks.
"""

import argparse
import contextlib
import sys

from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.pretrain import prepare_environment


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True, help="checkpoint directory (the run's --save)")
    parser.add_argument("--prompt", default="", help="text that the output starts with")
    parser.add_argument("--length", type=int, default=64, help="tokens to write (default: 64)")
    parser.add_argument("--steps", type=int, help="model calls (default: one a token)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: likeliest (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


def main() -> None:
    """Loads, decodes, prints."""
    options = parse()
    sys.argv = sys.argv[:1]  # Megatron parses the command line itself, and must not see ours
    if options.length < 1 or (options.steps is not None and options.steps < 1):
        raise UserError("--length and --steps must be at least 1")
    prepare_environment(options.device)

    import torch

    from megatron_mdm.generation import fill_masks

    with contextlib.ExitStack() as stack:
        # Megatron's messages go to stderr, its loggers' too, which keep the stream that they find
        # while they are imported; the text stays alone.
        with contextlib.redirect_stdout(sys.stderr):
            from megatron_mdm.mcore.device import training_device
            from megatron_mdm.mcore.inference import loaded_model

            stack.enter_context(training_device(options.device))
            loaded = stack.enter_context(loaded_model(options.load, options.device))
        prompt = loaded.tokenizer.tokenize(options.prompt) if options.prompt else []
        mask = loaded.args.mdm_mask_token_id
        if len(prompt) + options.length > loaded.args.seq_length:
            raise UserError(
                f"the prompt's {len(prompt)} tokens and --length {options.length} exceed the "
                f"model's {loaded.args.seq_length} positions: shorten one of them"
            )
        device = torch.cuda.current_device()
        tokens = torch.tensor([prompt + [mask] * options.length], device=device)
        generator = torch.Generator(device=device).manual_seed(options.seed)
        filled = fill_masks(
            loaded.logits,
            tokens,
            mask,
            options.steps or options.length,
            options.temperature,
            generator,
        )
        if loaded.args.rank == 0:
            print(loaded.tokenizer.detokenize(filled[0].tolist()))


if __name__ == "__main__":
    run_tool(main)
