"""Measures a checkpoint: its NELBO on text, or its answers to tasks of lm-evaluation-harness.

    python tools/evaluate.py --load checkpoints --data held_out.jsonl --json nelbo.json
    python tools/evaluate.py --load checkpoints --data my_text --rows 500 --draws 16
    python tools/evaluate.py --load checkpoints --tasks arc_easy hellaswag --json results.json
    python tools/evaluate.py --load checkpoints --tasks gsm8k --block-length 32

With --data, a text or JSONL file or the prefix of a .bin/.idx pair, the tool estimates the NELBO in
nats per token and bits per byte. A checkpoint that was trained in blocks is measured in blocks,
unless --block-size says otherwise; NELBOs of different sizes do not compare. Rows are drawn from
all over the data: whole documents at random, and rows of these at random. Rates are stratified,
masks have an exact count, and every row is masked --draws times. The first error bar is for the
choice of documents and masks together; it grows with the similarity of rows of one document. The
second error bar is for the masks alone. Use it to compare two checkpoints on the same rows with the
same seed. Bits per byte count the tokens that the run of the checkpoint scores.

With --tasks the tool answers questions. Among given answers it takes the one with the highest bound
on its likelihood. The bound is a mean over masks of the tokens of the answer: over all masks, if
there are at most --draws, and otherwise over --draws random masks. Texts are generated as
tools/generate.py does. `python -m megatron_mdm.lm_eval` has all flags of lm_eval's own command.

Under torchrun the ranks share the model.
"""

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import (
    add_block_size_argument,
    add_checkpoint_arguments,
    open_asked_for,
)
from megatron_mdm.data.documents import add_format_argument
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.files import check_output, write_json
from megatron_mdm.generation.decoder_flags import (
    DECODER_FLAGS,
    TOKEN_FLAGS,
    add_decoder_arguments,
    add_token_arguments,
)

if TYPE_CHECKING:
    from megatron_mdm.evaluation.nelbo import Estimate, Evaluation

# Flags that only --data uses, flags that only --tasks uses, and those of the latter that are
# arguments of the model of lm_eval.
OF_DATA = ("rows", "bins", "per_document", "format", "json_key")
OF_MODEL = ("max_length", *TOKEN_FLAGS, *DECODER_FLAGS)
OF_TASKS = (
    *("include_path", "num_fewshot", "fewshot_seed", "limit", "apply_chat_template"),
    *("system_instruction", "gen_kwargs", "confirm_run_unsafe_code", "log_samples", *OF_MODEL),
)


def parse() -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: a value is out of range, or flags do not go together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="text or JSONL file, or prefix of a .bin/.idx pair")
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="names of tasks, groups or tags of lm_eval (`lm_eval ls tasks` lists them), or .yaml "
        "files of tasks",
    )
    parser.add_argument(
        "--draws",
        type=int,
        help="number of masks: with --data masks of a row, an even number (default: 8); with "
        "--tasks masks of an answer, a multiple of 4 (default: 64)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of rows, rates, masks and generated texts (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="rows per model call (default: %(default)s)"
    )
    add_block_size_argument(parser)
    parser.add_argument("--json", metavar="FILE", help="JSON file for the results")
    data = parser.add_argument_group("with --data")
    data.add_argument(
        "--rows",
        type=int,
        default=200,
        help="largest number of rows to score (default: %(default)s)",
    )
    data.add_argument(
        "--bins", type=int, default=10, help="number of bins of t (default: %(default)s)"
    )
    data.add_argument(
        "--per-document",
        action="store_true",
        help="start a new row with every document instead of packing documents as in pretraining",
    )
    add_format_argument(data, "format of the file of --data")
    data.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in lines of JSONL (default: %(default)s)",
    )
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument(
        "--include-path", metavar="DIR", help="directory with .yaml files of more tasks"
    )
    tasks.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before each question (default: the task's)",
    )
    tasks.add_argument(
        "--fewshot-seed",
        type=int,
        default=1234,
        help="seed of the choice of examples (default: %(default)s, as in lm_eval)",
    )
    tasks.add_argument(
        "--limit",
        type=float,
        metavar="N",
        help="largest number of questions of a task; a number below 1 is a fraction of them",
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="write questions with the tokenizer's chat template; examples become earlier turns",
    )
    tasks.add_argument(
        "--system-instruction", metavar="TEXT", help="system message before every question"
    )
    tasks.add_argument(
        "--gen-kwargs",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="values that replace those of the task's generation_kwargs: max_gen_toks, until (once "
        "for each string that ends a text), do_sample, temperature, steps, block_length, "
        "remasking, threshold, edit_threshold, edit_steps",
    )
    tasks.add_argument(
        "--max-length",
        type=int,
        help="largest number of tokens in a row (default: the model's positions)",
    )
    add_token_arguments(tasks)
    add_decoder_arguments(tasks)
    tasks.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks run code that the model writes (HumanEval, MBPP)",
    )
    tasks.add_argument(
        "--log-samples", metavar="FILE", help="JSONL file for every question and answer"
    )
    options = parser.parse_args()
    for names, used, flag in ((OF_DATA, options.data, "data"), (OF_TASKS, options.tasks, "tasks")):
        for name in names:
            if used is None and getattr(options, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} is of no effect without --{flag}")
    if min(options.rows, options.bins, options.batch_size) < 1:
        raise UserError("--rows, --bins and --batch-size must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must not be negative")
    if options.tasks and options.draws is not None and (options.draws < 4 or options.draws % 4):
        raise UserError(f"--draws must be a multiple of 4 with --tasks, got {options.draws}")
    if options.draws is not None and (options.draws < 2 or options.draws % 2):
        raise UserError(f"--draws must be even and at least 2, got {options.draws}")
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise UserError(f"--limit {limit:g}: must be a whole number, or a share below 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot {options.num_fewshot}: must not be negative")
    options.gen_kwargs = [named_value(word) for word in options.gen_kwargs]
    for path, flag in ((options.json, "--json"), (options.log_samples, "--log-samples")):
        if path:
            check_output(path, flag)
    return options


def named_value(word: str) -> tuple[str, str]:
    """The name and the value of one word of --gen-kwargs.

    Raises:
        UserError: the word does not have the form NAME=VALUE.
    """
    name, equals, value = word.partition("=")
    if not name.isidentifier() or not equals:
        raise UserError(f"--gen-kwargs {word}: must have the form NAME=VALUE")
    return name, value


def main() -> None:
    """Loads, measures, prints."""
    options = parse()
    if options.tasks:
        answer(options)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Estimates the NELBO on --data.

    Args:
        options: values of the command line.
    """
    draws = 8 if options.draws is None else options.draws
    with open_asked_for(options, block_size=options.block_size) as loaded:
        import torch
        from tqdm import tqdm

        from megatron_mdm.evaluation.nelbo import evaluate
        from megatron_mdm.mcore.inference.eval_data import sampled_rows

        rows, per_byte = sampled_rows(
            loaded,
            options.data,
            options.json_key,
            options.rows,
            options.seed,
            options.format,
            packed=not options.per_document,
        )
        masks, first = len(rows) * draws, loaded.args.rank == 0
        with tqdm(unit="masks", total=masks, disable=not first) as bar:
            result = evaluate(
                loaded.logits,
                rows,
                loaded.mask_token_id,
                draws,
                options.bins,
                options.seed,
                options.batch_size,
                torch.cuda.current_device(),
                bar.update,
                loaded.block_size,
            )
        if first:
            report(options, result, per_byte, loaded.block_size)


def answer(options: argparse.Namespace) -> None:
    """Answers the questions of --tasks.

    Args:
        options: values of the command line.
    """
    prepare_environment(options.device)  # before lm_eval imports anything
    from megatron_mdm.lm_eval.tasks import (
        ask,
        generation_settings,
        load_tasks,
        task_manager,
    )

    manager = task_manager(options.include_path)
    tasks = load_tasks(manager, options.tasks, options.confirm_run_unsafe_code)
    from megatron_mdm.evaluation.nelbo import DRAWS

    settings = {
        "batch_size": options.batch_size,
        "draws": options.draws or DRAWS,
        "seed": options.seed,
        **{name: getattr(options, name) for name in OF_MODEL},
    }
    if options.special_tokens is None and options.apply_chat_template:
        settings["special_tokens"] = True  # the template writes special tokens as text
    with open_asked_for(options, block_size=options.block_size) as loaded:
        from megatron_mdm.lm_eval.checkpoint_model import adapter_arguments
        from megatron_mdm.lm_eval.harness import HarnessModel

        results = ask(
            HarnessModel(**adapter_arguments(loaded, **settings)),
            tasks,
            manager,
            model_args={"load": options.load, "block_size": options.block_size, **settings},
            num_fewshot=options.num_fewshot,
            fewshot_random_seed=options.fewshot_seed,
            limit=options.limit,
            gen_kwargs=generation_settings(options.gen_kwargs) or None,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            system_instruction=options.system_instruction,
            log_samples=options.log_samples is not None,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
        if results is not None and loaded.args.rank == 0:
            report_answers(options, results)


def report_answers(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes the results of tasks to --json and --log-samples, and then prints them.

    A print may fail, since the tables have arrows, which not every terminal can show.

    Args:
        options: values of the command line.
        results: what `ask` returns.
    """
    from lm_eval.utils import make_table

    from megatron_mdm.lm_eval.tasks import write_results, write_samples

    if options.json:
        write_results(options.json, results)
    if options.log_samples:
        write_samples(options.log_samples, results)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def report(
    options: argparse.Namespace,
    result: "Evaluation",
    tokens_per_byte: float | None,
    block_size: int | None,
) -> None:
    """Writes the results to --json, and then prints them.

    Args:
        options: values of the command line.
        result: what `evaluate` returns.
        tokens_per_byte: scored tokens per byte of text, None if unknown.
        block_size: tokens in a block; None: whole rows.
    """
    lines = [
        f"{result.num_tokens:,} tokens in {result.num_rows} rows of {result.num_documents} "
        f"documents, {result.num_draws} masks each",
        f"NELBO {_text(result.nelbo)} nats/token",
    ]
    if block_size is not None:
        lines.insert(1, f"blocks of {block_size} tokens, given the clean blocks before them")
    if result.nelbo.stderr is None:
        lines.append("its error over the choice of documents is unknown: it takes rows of several")
    figures = {
        "nelbo": _figures(result.nelbo),
        "num_tokens": result.num_tokens,
        "num_rows": result.num_rows,
        "num_documents": result.num_documents,
        "num_draws": result.num_draws,
        "seed": options.seed,
        "block_size": block_size,
    }
    if tokens_per_byte:
        factor = tokens_per_byte / math.log(2)
        lines.append(f"NELBO {_text(result.nelbo, factor)} bits/byte")
        figures["bits_per_byte"] = _figures(result.nelbo, factor)
    bins, n = [], len(result.bins)
    for i, estimate in enumerate(result.bins):
        low, high = i / n, (i + 1) / n
        if estimate is not None:
            stderr = "unknown" if estimate.stderr is None else f"{estimate.stderr:.4f}"
            lines.append(f"t in ({low:.2f}, {high:.2f}]  {estimate.value:.4f} +- {stderr}")
            bins.append(
                {"low": low, "high": high, "value": estimate.value, "stderr": estimate.stderr}
            )
    if options.json:
        write_json(options.json, {**figures, "bins": bins})
    print("\n".join(lines))


def _text(estimate: "Estimate", factor: float = 1.0) -> str:
    stderr = "unknown" if estimate.stderr is None else f"{factor * estimate.stderr:.4f}"
    masks = f"{factor * estimate.draw_stderr:.4f}"
    return f"{factor * estimate.value:.4f} +- {stderr} (masks alone: {masks})"


def _figures(estimate: "Estimate", factor: float = 1.0) -> dict[str, float | None]:
    return {
        "value": factor * estimate.value,
        "stderr": None if estimate.stderr is None else factor * estimate.stderr,
        "draw_stderr": factor * estimate.draw_stderr,
    }


def uncover_evaluate() -> None:
    """Removes this directory from the path: this file hides the library `evaluate` of lm_eval."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [path for path in sys.path if os.path.abspath(path) != here]


if __name__ == "__main__":
    uncover_evaluate()
    run_tool(main)
