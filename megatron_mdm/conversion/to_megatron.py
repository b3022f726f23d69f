"""Converts Hugging Face safetensors to Megatron checkpoints, one tensor at a time."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from megatron_mdm.conversion import megatron_model, safetensors_model, torch_dist
from megatron_mdm.conversion.common import (
    Pair,
    cast,
    check_space,
    equal,
    escaping,
    pair_tensors,
    progress,
    write_hub_files,
)
from megatron_mdm.conversion.common import verify as verify_tensors
from megatron_mdm.conversion.config import Config
from megatron_mdm.conversion.families import detect
from megatron_mdm.conversion.family import (
    Family,
    block_size,
    mask_token_id,
    model_flags,
    shift_first,
    shifted,
)
from megatron_mdm.conversion.layout import Heads, join, keeps_its_dtype, split
from megatron_mdm.conversion.logits import compare_logits
from megatron_mdm.conversion.tokenizer import (
    MASK_TOKEN,
    add_mask_token,
    code_of,
    data_of,
    known_mask,
    leave_out_code,
    tokenizer_size,
    write_fast_tokenizer,
)
from megatron_mdm.conversion.torch_dist import DistCheckpoint, Piece
from megatron_mdm.conversion.vocabulary import TENSORS, Vocabulary, vocabulary
from megatron_mdm.data.fingerprint import fingerprint
from megatron_mdm.errors import UserError
from megatron_mdm.files import new_directory
from megatron_mdm.hub_files import HUB_FILES

LAUNCH_FILE = "launch.txt"
# Tensors of some releases that are computed from the configuration; they are not converted.
COMPUTED = (".rotary_emb.inv_freq",)
_PRECISION = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}
# Flags of the launch line that training needs and that the user may change. LLaDA's pretraining
# ended with a learning rate of 1e-5. The rate decays from there to a tenth and not to 0, so that
# more --train-iters can extend the run. The ranks shard the optimizer's state.
_CHOICES = """
--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --overlap-grad-reduce
--micro-batch-size 1 --global-batch-size 64 --train-iters 10000
--lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 100 --save-interval 1000
--split 99,1,0 --eval-interval 1000 --eval-iters 8 --log-interval 10
""".split()


def to_megatron(
    source: str,
    output: str,
    *,
    add_mask: bool = False,
    keep_shift: bool = True,
    multiple: int = 1,
    model_class: str = "gpt",
    dtype: torch.dtype | None = None,
    verify: bool = False,
    trust: bool = False,
    log: Callable[[str], object] = print,
) -> None:
    """Converts a Hugging Face safetensors model to a Megatron torch_dist checkpoint.

    Args:
        source: model directory.
        output: checkpoint directory to create.
        add_mask: give an autoregressive model a mask token.
        keep_shift: a model that gets a mask token keeps predicting the token after each position.
        multiple: Megatron's vocabulary is padded to a multiple of this number.
        model_class: class of Megatron's model, `gpt` or `hybrid`.
        dtype: dtype to write; None for the source's.
        verify: read the output again and compare its tensors and logits.
        trust: the Python code of the directory may run: its modeling code in the comparison, and
            its tokenizer's code whenever the checkpoint is used.
        log: prints a line for the user.

    Raises:
        UserError: the model cannot be converted exactly, or the output cannot be written.
    """
    log_line = escaping(log)
    with new_directory(output) as temporary:
        directory = Path(source)
        config = safetensors_model.read_object(directory / "config.json")
        family = detect(config)
        safetensors_model.check_no_adapter(directory)
        model = safetensors_model.HubModel(directory)
        vocab = vocabulary(config, directory, mask_token_id(family, config), add_mask, multiple)
        dtype = dtype or _common_dtype(model, family)
        shift = keep_shift if vocab.added else shifted(family, config)
        blocks = block_size(family, config)
        first = shift_first(family, config, shift, blocks)
        hub_files = Path(temporary) / HUB_FILES
        write_hub_files(directory, hub_files, family, config, vocab)
        write_fast_tokenizer(hub_files)
        left_out = None if trust else leave_out_code(hub_files)
        if vocab.added:
            assert vocab.mask is not None
            add_mask_token(hub_files, vocab.mask)
        flags = [
            *model_flags(family, config),
            *(["--mdm-model", model_class] if model_class != "gpt" else []),
            *["--padded-vocab-size", str(vocab.padded)],
            *(["--mdm-mask-token-id", str(vocab.mask)] if vocab.mask is not None else []),
            *_PRECISION.get(dtype, []),
            *tokenizer_flags(hub_files, Path(output), vocab, config),
        ]
        expected = megatron_model.checkpoint_contents(flags)
        args = megatron_model.arguments(flags)
        args.mdm_shift, args.mdm_vocab_size = shift, vocab.size
        args.mdm_block_size, args.mdm_shift_first = blocks, first
        known = data_of(hub_files)
        args.mdm_tokenizer = None if known is None else asdict(fingerprint(known))
        heads = Heads(args.num_attention_heads, args.num_query_groups)
        tied = family.tied(config)
        tensor_pairs = pair_tensors(
            family, config, expected.shapes, heads, vocab.source, "the table"
        )
        _check_sources(model, tensor_pairs, directory, family, tied)
        parameters = sum(pair.parameters for pair in tensor_pairs)

        def dtype_of(pair: Pair) -> torch.dtype:
            return model.entries[pair.names[0]].dtype if keeps_its_dtype(pair.target) else dtype

        def sources(pair: Pair) -> list[torch.Tensor]:
            """Reads the Hugging Face tensors, in the written dtype and with Megatron's rows."""
            tensors = map(model.read, pair.names)
            if pair.target in TENSORS:
                tensors = map(vocab.widen, tensors)
            named = zip(pair.names, tensors, strict=True)
            return [cast(tensor, dtype_of(pair), name) for name, tensor in named]

        def make(pair: Pair) -> torch.Tensor:
            return join(pair.target, sources(pair), heads)

        pieces = [
            Piece(place, expected.shapes[place.key], dtype_of(pair), partial(make, pair))
            for pair in tensor_pairs
            for place in pair.places
        ]
        total = sum(torch.Size(p.place.shape).numel() * p.dtype.itemsize for p in pieces)
        check_space(temporary, total)
        with progress(total, "converting") as advance:
            torch_dist.write(Path(temporary), pieces, expected.objects, args, advance)
        if shift:
            flags.append("--mdm-shift")
        if blocks is not None:
            flags += ["--mdm-block-size", str(blocks)]
        if first == "noisy":
            flags += ["--mdm-shift-first", first]
        flags += family.training_flags
        launch = None if vocab.mask is None else launch_line(output, flags)
        if launch is not None:
            (Path(temporary) / LAUNCH_FILE).write_text(launch + "\n")
        if verify:
            checkpoint = DistCheckpoint(Path(temporary))

            def read_back(pair: Pair) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
                """Reads the written tensors and splits them into Hugging Face tensors."""
                wanted = sources(pair)
                for place in pair.places:
                    parts = split(pair.target, checkpoint.read(place), len(wanted), heads)
                    yield from zip(pair.names, parts, wanted, strict=True)

            verify_tensors(tensor_pairs, read_back, log_line)
            compare_logits(
                family,
                config,
                directory,
                checkpoint.path,
                vocab.source,
                padded=vocab.padded,
                parameters=parameters,
                dtype=dtype,
                trust=trust,
                log=log_line,
                model=model_class,
                added=vocab.mask if vocab.added else None,
            )
    if left_out:
        log_line(f"the tokenizer is tokenizer.json; its Python code, {left_out}, was not run")
    for line in _remarks(family, config, directory, vocab, tied, shift, blocks):
        log_line(line)
    log_line(f"{output}: {family.name}, {parameters:,} parameters, {dtype}")
    if launch is not None:
        log(
            "this command starts or resumes the training (also in launch.txt); put your own paths "
            "for MY_RUN and MY_DATA, and change batch, schedule and layout as you need, "
            "see examples/pretrain/README.md:\n\n"
            f"{launch}\n"
        )


def _check_sources(
    model: safetensors_model.HubModel,
    tensor_pairs: Sequence[Pair],
    directory: Path,
    family: Family,
    tied: bool,
) -> None:
    """Checks that every tensor is there in the right shape, and that none is left over."""
    used: set[str] = set()
    for pair in tensor_pairs:
        for name, shape in zip(pair.names, pair.shapes, strict=True):
            entry = model.entries.get(name)
            if entry is None:
                raise UserError(
                    f"{directory} lacks the tensor {name}, which the family {family.name} needs"
                )
            if entry.shape != shape:
                raise UserError(
                    f"{entry.path}: {name} has shape {list(entry.shape)}, config.json implies "
                    f"{list(shape)}"
                )
        used.update(pair.names)
    if tied:
        used |= _check_tied(model, family)
    unused = sorted(n for n in set(model.entries) - used if not n.endswith(COMPUTED))
    if unused:
        raise UserError(
            f"{directory} has the tensor {unused[0]}, which the family {family.name} has no place "
            f"for ({len(unused)} in all): the converted model would not be the same"
        )


def _check_tied(model: safetensors_model.HubModel, family: Family) -> set[str]:
    """Checks a tied model: if the files have an output layer, it must equal the embedding.

    Returns:
        The name of the output layer, if the files have it.
    """
    (embedding,), (output,) = (family.tensors[name] for name in TENSORS)
    if output not in model.entries:
        return set()
    if not equal(model.read(embedding), model.read(output)):
        raise UserError(
            f"config.json ties the embeddings, but {output} differs from {embedding}: set "
            f"{family.tied_key} to false"
        )
    return {output}


def _common_dtype(model: safetensors_model.HubModel, family: Family) -> torch.dtype:
    others = list(COMPUTED)
    for target, sources in family.tensors.items():
        if keeps_its_dtype(target):
            others += [source.rpartition("}")[2] for source in sources]
    dtypes: dict[torch.dtype, str] = {}
    for name, entry in model.entries.items():
        if not name.endswith(tuple(others)):
            dtypes.setdefault(entry.dtype, name)
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        raise UserError(
            f"the tensors differ in dtype ({first}: {one}, {second}: {other}): choose one with "
            "--dtype"
        )
    return next(iter(dtypes))


def tokenizer_flags(hub_files: Path, output: Path, vocab: Vocabulary, config: Config) -> list[str]:
    """Returns Megatron's flags for the tokenizer beside the converted model."""
    if tokenizer_size(hub_files) is None:
        flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab.size)]
        end = config.get("eos_token_id")
        return [*flags, *(["--null-tokenizer-eod-id", str(end)] if isinstance(end, int) else [])]
    flags = ["--tokenizer-type", "HuggingFaceTokenizer"]
    flags += ["--tokenizer-model", str(output.absolute() / HUB_FILES)]
    if code_of(hub_files):
        flags.append("--trust-remote-code")
    return flags


def launch_line(output: str, flags: Sequence[str]) -> str:
    """Returns the command that trains the converted model or resumes that training."""
    words = [
        *["--pretrained-checkpoint", str(Path(output).absolute())],
        *["--load", "MY_RUN", "--save", "MY_RUN"],
        *flags,
        *["--data-path", "MY_DATA", *_CHOICES],
    ]
    lines, line = [], "torchrun --nproc-per-node 8 -m megatron_mdm.pretrain"
    for i, word in enumerate(words):
        value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
        if word.startswith("--") and len(f"{line} {word} {value}") > 96:
            lines.append(line)
            line = "   "
        line += " " + bash_quoted(word)
    return " \\\n".join([*lines, line])


def bash_quoted(word: str) -> str:
    """Quotes a word for bash, with printable characters only."""
    if word.isprintable():
        return shlex.quote(word)
    shown = ""
    for c in word:
        as_bytes = "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))
        shown += c if c.isprintable() and c not in "\\'" else as_bytes
    return f"$'{shown}'"


def _remarks(
    family: Family,
    config: Config,
    directory: Path,
    vocab: Vocabulary,
    tied: bool,
    shift: bool,
    blocks: int | None,
) -> Iterator[str]:
    if vocab.added:
        yield (
            f"added the mask token {MASK_TOKEN} with id {vocab.mask}"
            + (
                f", which enlarges the vocabulary to {vocab.size}"
                if vocab.size > vocab.source
                else ", an unused row of the vocabulary"
            )
            + "; its rows in the embedding"
            + (" (which is the output layer)" if tied else " and the output layer")
            + " are the mean of those before it"
        )
    if vocab.mask is None:
        known = known_mask(directory)
        yield (
            f"config.json names no mask token: {known}"
            if known is not None
            else "this is an autoregressive model without a mask token: to train it as a diffusion "
            "model, convert it with --add-mask-token"
        )
    if vocab.padded > vocab.size:
        yield (
            f"padded the vocabulary from {vocab.size} to {vocab.padded} rows: the padding is zeros "
            "and takes no part in the softmax"
        )
    if shift:
        yield "the logits of position i - 1 predict token i: --mdm-shift"
    if blocks is not None:
        yield f"the model fills in blocks of {blocks} tokens: --mdm-block-size {blocks}"
    if shift_first(family, config, shift, blocks) == "noisy":
        yield (
            "it was trained to predict the first token of a block from a noisy token, and is read "
            "from a clean one: --mdm-shift-first noisy trains as it was trained, clean as it is "
            "read"
        )
    if family.training_flags:
        yield (
            f"{' '.join(family.training_flags)}: the biases by which the model chooses its experts "
            "stay as they are, see megatron_mdm/conversion/README.md"
        )
    if family.experts_key or family.dense_layers_key:
        yield (
            "the training chooses how to balance the load of the experts: --moe-aux-loss-coeff "
            f"(config.json: {config.get('router_aux_loss_coef')!r})"
        )
