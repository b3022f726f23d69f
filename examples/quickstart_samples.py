r"""Measures what a small model of Python code has learned, on 20 samples and on held-out text.

    python examples/quickstart_samples.py --load runs/quickstart/checkpoint --device cpu \
        --training runs/quickstart/text.txt --held-out runs/quickstart/held_out

Sample i begins with prompt i and uses seed i. All 20 samples count. Each prompt is checked: the
training text does not contain it. The measures are:

statements  A sample is cut after its last line end, since the length cuts its last line off. It
            passes if ast.parse accepts it. It also passes if Python only misses a continuation (of
            a bracket or a block) and ast.parse accepts it without its last statement. An unclosed
            string is no such continuation, since all text may follow in it. After the prompt at
            least one statement must remain that is not just a string.
names       In the longest run of first lines that ast.parse accepts: the share of the names read
            after the prompt that are builtin or bound earlier in the sample, in whatever scope.
copied      The longest run of characters that the model wrote and the training text contains.
held out    The NELBO of the held-out text in nats per byte, which does not depend on the tokenizer.

The median sample is the tenth of the twenty when they are ordered by the share of their complete
lines that ast.parse accepts, then by the share of names, then by their number.
"""

import argparse
import ast
import builtins
import codeop
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint import add_checkpoint_arguments, open_asked_for
from megatron_mdm.data.documents import document_text, read_documents, resolve_inputs
from megatron_mdm.errors import UserError, check_numbers, run_tool
from megatron_mdm.files import check_output, write_json
from megatron_mdm.generation.decoder_flags import (
    DECODER_FLAGS,
    SAMPLING_FLAGS,
    add_decoder_arguments,
    add_sampling_arguments,
)
from megatron_mdm.generation.display import shown_on

if TYPE_CHECKING:
    from megatron_mdm.mcore.inference.loaded_model import LoadedModel

PROMPTS = (
    "def count_words(sentence):\n",
    "def is_palindrome(word):\n",
    "def read_recipes(path):\n",
    "def add_to_basket(basket, fruit):\n",
    "def find_cheapest(offers, limit=None):\n",
    "def rename_planets(planets, names):\n",
    "def print_timetable(trains, station):\n",
    "def mean_temperature(days):\n",
    "def load_recipe(name, encoding='utf-8'):\n",
    "def split_bill(total, guests):\n",
    "class Teapot:\n",
    "class Library:\n    def __init__(self, books):\n",
    "class Robot:\n    def move(self, direction):\n",
    "class Orchestra:\n    def tune(self, instrument, pitch):\n",
    "class Lighthouse:\n    def is_lit(self):\n",
    "class Greenhouse(object):\n    def water(self, plants):\n",
    "for planet in planets:\n",
    "if len(recipes) > 12:\n",
    "while teapot.is_warm():\n",
    "with open(menu_path) as menu:\n",
)
CUT_OFF: int = codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]


def main() -> None:
    """Loads, samples, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_arguments(parser, pipeline=False)
    what = parser.add_argument_group("texts")
    what.add_argument(
        "--training", required=True, metavar="LIST", help="names of the training files, one a line"
    )
    what.add_argument(
        "--held-out", required=True, metavar="DATA", help="text file, or prefix of .bin/.idx"
    )
    what.add_argument("--rows", type=int, default=256, help="of held-out text (default: 256)")
    what.add_argument("--draws", type=int, default=4, help="masks of a row (default: 4)")
    what.add_argument("--length", type=int, default=96, help="tokens of a sample (default: 96)")
    what.add_argument("--json", metavar="FILE", help="also write the measures and samples here")
    decoder = parser.add_argument_group("decoder")
    add_decoder_arguments(decoder)
    add_sampling_arguments(decoder)
    options = parser.parse_args()
    check_numbers(options, "rows", "length")
    check_numbers(options, "draws", least=2)
    if options.json:
        check_output(options.json, "--json")
    training = text_of(options.training)
    for prompt in PROMPTS:
        if prompt in training:
            raise UserError(f"--training {options.training}: it contains the prompt {prompt!r}")
    with open_asked_for(options) as loaded:
        texts = write(loaded, options)
        nats = nats_per_byte(loaded, options)
    numbered = enumerate(zip(PROMPTS, texts, strict=True))
    samples = [measured(number, *pair, training) for number, pair in numbered]
    report(samples, nats, options.json)


def text_of(path: str) -> str:
    """The texts of the files that a file names, one a line.

    Between two files stands a character that no Python source has, so that no run of characters
    goes on from one file into the next.

    Raises:
        UserError: a file cannot be read.
    """
    files = resolve_inputs([], path)
    return "\0".join(document_text(file, "") for file in read_documents(files, "text"))


Place = tuple[int, int]  # line and column


@dataclass(frozen=True)
class Sample:
    """What a sample is like.

    Attributes:
        number: of the sample, its prompt and its seed.
        prompt: its first lines.
        text: the prompt and what the model wrote.
        passes: whether the complete statements parse.
        lines: complete lines that the model wrote.
        parsed_lines: the most of them, from the first on, that ast.parse accepts.
        names: that are read in these.
        defined: of the names, those that are defined before.
        copied: the longest run of characters that stands in the training text.
    """

    number: int
    prompt: str
    text: str
    passes: bool
    lines: int
    parsed_lines: int
    names: int
    defined: int
    copied: str

    def rank(self) -> tuple[float, float, int]:
        """By which samples are ordered to find the median one."""
        share = self.parsed_lines / max(self.lines, 1)
        return share, self.defined / max(self.names, 1), self.number


def measured(number: int, prompt: str, text: str, training: str) -> Sample:
    """Measures a sample; see the module for the measures."""
    given = prompt.count("\n")
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    accepted = [n for n in range(given + 1, len(lines) + 1) if tree_of("".join(lines[:n]))]
    parsed = max(accepted, default=given)
    tree = tree_of("".join(lines[:parsed]))
    names = list(names_read(tree, given)) if tree and parsed > given else []
    return Sample(
        number,
        prompt,
        text,
        complete_statements_parse("".join(lines), given),
        len(lines) - given,
        parsed - given,
        len(names),
        sum(names),
        longest_copy(text[len(prompt) :], training),
    )


def compiled(text: str, flags: int = 0) -> ast.Module | Exception:
    """The syntax tree of a text, or the error of the compiler, with flags of the compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in strings
        try:
            return compile(text, "sample", "exec", ast.PyCF_ONLY_AST | flags)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return error


def tree_of(text: str) -> ast.Module | None:
    """The syntax tree of a text, None if Python does not accept it."""
    tree = compiled(text)
    return tree if isinstance(tree, ast.Module) else None


def is_cut_off(text: str) -> bool:
    """Whether a text that does not parse could parse if it went on."""
    error = compiled(text, CUT_OFF)
    return isinstance(error, SyntaxError) and "incomplete input" in str(error)


def has_unclosed_string(text: str) -> bool:
    """Whether a text ends within a string."""
    error = compiled(text)
    return isinstance(error, SyntaxError) and error.msg.startswith("unterminated")


def complete_statements_parse(text: str, given: int) -> bool:
    """Whether the complete statements of a text pass ast.parse.

    Args:
        text: whole lines, of which the first ones alone are no complete statement.
        given: number of these.
    """
    if has_unclosed_string(text):
        return False
    lines = text.splitlines(keepends=True)
    for number in range(len(lines), given, -1):
        part = "".join(lines[:number])
        if tree := tree_of(part):
            return any(node.lineno > given and not is_string(node) for node in statements(tree))
        if not is_cut_off(part):
            return False
    return False


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements of a text, also those within others."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def is_string(statement: ast.stmt) -> bool:
    """Whether a statement is just a string, as a docstring is."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str | bytes)
    )


def names_read(tree: ast.Module, given: int) -> Iterator[bool]:
    """For each name that is read after the first lines: whether it is builtin or bound before.

    Args:
        tree: of a text.
        given: number of the first lines.
    """
    bound: dict[str, Place] = dict.fromkeys(dir(builtins), (0, 0))
    places: dict[ast.AST, Place] = {}  # where names are bound at another place than their own
    reads = []
    for node in ast.walk(tree):  # a node comes before its parts
        match node:
            case ast.Assign(targets=targets):  # bound after the value
                places |= dict.fromkeys(_parts(targets), end_of(node))
            case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
                places |= dict.fromkeys(_parts([target]), end_of(node))
            case ast.NamedExpr(target=target):
                places[target] = end_of(node)
            case ast.comprehension(target=target):  # its names are used before it too
                places |= dict.fromkeys(_parts([target]), (target.lineno, 0))
            case ast.Name(id=name, ctx=ast.Load()):
                reads.append((start_of(node), name))
        if name := name_bound_by(node):
            bound[name] = min(bound.get(name, (sys.maxsize, 0)), places.get(node) or start_of(node))
    for place, name in sorted(reads):
        if place[0] > given:
            yield name in bound and bound[name] <= place


def name_bound_by(node: ast.AST) -> str | None:
    """The name that a node binds, None if it binds none."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.alias(name=name, asname=other):
            return other or name.partition(".")[0]
        case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name):
            return name
        case ast.MatchMapping(rest=name):
            return name
    return None


def _parts(nodes: list[ast.expr]) -> Iterator[ast.AST]:
    return (part for node in nodes for part in ast.walk(node))


def start_of(node: Any) -> Place:
    """The line and the column at which a node begins."""
    return node.lineno, node.col_offset


def end_of(node: Any) -> Place:
    """The line and the column at which a node ends."""
    return node.end_lineno, node.end_col_offset


def longest_copy(text: str, training: str) -> str:
    """The longest run of characters of a text that another text contains; of several the first."""
    best = ""
    for start in range(len(text)):
        while start + len(best) < len(text) and text[start : start + len(best) + 1] in training:
            best = text[start : start + len(best) + 1]
    return best


def write(loaded: "LoadedModel", options: argparse.Namespace) -> list[str]:
    """The samples: prompts and what the model writes after them."""
    import torch

    from megatron_mdm.generation.prompts import prompt_tokens, same_lengths, until_end
    from megatron_mdm.mcore.inference.eval_data import decoder_of, encoder

    tokenize, mask = encoder(loaded), loaded.mask_token_id
    rows = [prompt_tokens(tokenize, text, options.length, "", "<mask>", mask) for text in PROMPTS]
    if max(map(len, rows)) > loaded.max_length:
        raise UserError(
            f"--length {options.length}: with the longest prompt this makes {max(map(len, rows))} "
            f"positions, and the model has {loaded.max_length}"
        )
    names = (*DECODER_FLAGS, *SAMPLING_FLAGS)
    decoder = decoder_of(loaded, **{name: getattr(options, name) for name in names})
    device = torch.cuda.current_device()
    texts = {}
    for batch in same_lengths(rows, len(rows)):
        tokens = torch.tensor([rows[i] for i in batch], device=device)
        generators = [torch.Generator(device).manual_seed(i) for i in batch]
        for i, row in zip(batch, decoder(loaded.logits, tokens, generators).tolist(), strict=True):
            given = [token != mask for token in rows[i]]
            texts[i] = loaded.tokenizer.detokenize(until_end(row, given, decoder.end_token_ids))
    return [texts[i] for i in range(len(PROMPTS))]


def nats_per_byte(loaded: "LoadedModel", options: argparse.Namespace) -> tuple[float, float | None]:
    """The NELBO of held-out text and its standard error, as tools/evaluate.py measures it.

    Raises:
        UserError: the data cannot be read, or their bytes are not known.
    """
    import torch

    from megatron_mdm.evaluation.nelbo import evaluate
    from megatron_mdm.mcore.inference.eval_data import sampled_rows

    rows, factor = sampled_rows(loaded, options.held_out, "text", options.rows, seed=0)
    if factor is None:
        raise UserError(f"--held-out {options.held_out}: its length in bytes is not known")
    nelbo = evaluate(
        loaded.logits,
        rows,
        loaded.mask_token_id,
        options.draws,
        device=torch.cuda.current_device(),
        block_size=loaded.block_size,
    ).nelbo
    return factor * nelbo.value, None if nelbo.stderr is None else factor * nelbo.stderr


def report(samples: list[Sample], nats: tuple[float, float | None], path: str | None) -> None:
    """Prints the measures and the median sample, and writes them to a JSON file.

    Args:
        samples: all of them.
        nats: per byte of held-out text, and its standard error.
        path: of the file.
    """
    count = len(samples)
    passing = sum(sample.passes for sample in samples)
    names, defined = (sum(getattr(x, name) for x in samples) for name in ("names", "defined"))
    longest = max((sample.copied for sample in samples), key=len)
    median = sorted(samples, key=Sample.rank)[(count - 1) // 2]
    value, stderr = nats
    rows = (
        ("held-out text", f"{value:.3f}" + (f" +- {stderr:.3f}" if stderr else "") + " nats/byte"),
        ("samples whose complete statements parse", f"{passing} of {count}"),
        ("names defined before use", f"{defined} of {names} ({defined / max(names, 1):.0%})"),
        (
            "longest run copied from the training text",
            f"{len(longest)} characters (median sample: {len(median.copied)})",
        ),
    )
    for name, found in rows:
        print(f"{name:42}  {found}")
    print(
        f"the median of the {count} samples (prompt and seed {median.number}; "
        f"ast.parse accepts {median.parsed_lines} of its {median.lines} lines):"
    )
    print(shown_on(sys.stdout, median.text.rstrip("\n")))
    if path:
        figures = {
            "nats_per_byte": value,
            "nats_per_byte_stderr": stderr,
            "passing": passing,
            "names": names,
            "names_defined": defined,
            "longest_copy": longest,
            "median_sample": median.number,
            "samples": [asdict(sample) for sample in samples],
        }
        write_json(path, figures)


if __name__ == "__main__":
    run_tool(main)
