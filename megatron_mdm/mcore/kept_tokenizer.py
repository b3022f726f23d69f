"""The tokenizer that a run keeps beside its checkpoints, so that their directory can move.

A checkpoint's arguments name the tokenizer by its path. On another machine, or once the original
has gone, that path names nothing, or something else. The copy in the directory of the checkpoints
is therefore what is looked for first: `huggingface/`, as a conversion writes it, or
`tokenizer.model` and its like, a single file.
"""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from typing import Any

from megatron.training import checkpointing

from megatron_mdm.checkpoint import HUB_FILES
from megatron_mdm.data.outputs import complete_or_absent, new_directory, set_aside, write_errors
from megatron_mdm.data.record import file_digest, read_errors
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint_files import RELEASE, is_remote
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.ranks import is_first_rank, notice

DIRECTORY = "HuggingFaceTokenizer"
# Types whose tokenizer is one file.
FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
# What belongs to a tokenizer in a directory of Hugging Face, which may hold weights and data too:
# its files, config.json, which transformers reads for it, and the code, card and license of the
# model, which go back with it to Hugging Face.
NAMES = """
*token*.json vocab*.json chat_template*.json config.json generation_config.json *.jinja *.model
*.tiktoken merges.txt vocab*.txt *.py README* LICENSE* NOTICE*
""".split()
MOST_BYTES = 10**9


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a run's tokenizer.

    Attributes:
        source: the file or directory that they are.
        name: of the copy in a directory of checkpoints.
        sums: file -> SHA-256 when the run began.
    """

    source: Path
    name: str
    sums: dict[Path, str]

    def keep(self, directory: Path) -> None:
        """Puts a copy into a directory of checkpoints, complete or not at all, unless it is there.

        A directory that a conversion made keeps its own, which may have a mask token more. Says so
        if the tokenizer has changed or gone since the run began, and makes no copy then.

        Raises:
            UserError: it cannot be written.
        """
        target = directory / self.name
        is_converted = (directory / RELEASE).is_dir() and target.exists()
        copies = {self._copy(path, target): expected for path, expected in self.sums.items()}
        if is_converted or _are(copies):
            return
        if not _are(self.sums):
            notice(
                f"the tokenizer {self.source} is not what it was when the run began: no copy of it "
                f"goes into {directory}"
            )
            return
        if target.exists():
            notice(f"{target}, another tokenizer, gives way to that of this run, {self.source}")
        if self.source in self.sums:
            with complete_or_absent(str(target)) as (temporary,), write_errors(str(target)):
                copyfile(self.source, temporary)
            return
        before = set_aside(str(target)) if target.exists() else nullcontext()
        with before, new_directory(str(target)) as temporary:
            for path in self.sums:
                copyfile(path, self._copy(path, Path(temporary)))

    def _copy(self, path: Path, target: Path) -> Path:
        """Where the copy of a file is."""
        return target if path == self.source else target / path.name


def _are(sums: Mapping[Path, str]) -> bool:
    """Whether all files are there, with these sums."""
    try:
        return all(file_digest(str(path)) == expected for path, expected in sums.items())
    except OSError:
        return False


def tokenizer_files(args: Namespace) -> TokenizerFiles | None:
    """The files of the tokenizer that a run has loaded; on the first rank alone.

    Args:
        args: of the run.

    Returns:
        None on other ranks, where nothing is saved, for a tokenizer without files, and for one
        that is too large to be one.

    Raises:
        UserError: a file cannot be read.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    if path is None or kind not in (DIRECTORY, *FILE) or not is_first_rank():
        return None
    if args.save is None or is_remote(args.save) or args.skip_train:
        return None
    place = path
    if kind == DIRECTORY and not os.path.isdir(path):
        place = fetched_before(path) or path
    source = Path(place).absolute()
    files = [source]
    if source.is_dir():
        with read_errors(source):
            files = [path for path in sorted(source.iterdir()) if _belongs(path)]
    with read_errors(source):
        size = sum(path.stat().st_size for path in files)
        if size > MOST_BYTES:
            notice(
                f"the tokenizer {path} has {size / 1e9:.1f} GB of files: no copy of it goes into "
                f"{args.save}"
            )
            return None
        sums = {path: file_digest(str(path)) for path in files}
    return TokenizerFiles(source, _name(kind, path), sums)


def _belongs(path: Path) -> bool:
    names = any(fnmatch(path.name, pattern) for pattern in NAMES)
    return names and not path.name.startswith(".") and path.is_file()


def _name(kind: str, path: str) -> str:
    """Of the copy of a tokenizer of this type and path."""
    return HUB_FILES if kind == DIRECTORY else f"tokenizer{Path(path).suffix}"


def kept_tokenizer(directory: str, args: Namespace) -> str | None:
    """The tokenizer that lies beside checkpoints, None if there is none.

    Args:
        directory: that --save named.
        args: of one of its checkpoints, or of a run with such a tokenizer.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    if path is None or kind not in (DIRECTORY, *FILE) or is_remote(directory):
        return None
    own = os.path.join(directory, _name(kind, path))
    is_there = os.path.isdir if kind == DIRECTORY else os.path.isfile
    return own if is_there(own) else None


def tokenizer_of(directory: str, args: Namespace) -> str | None:
    """Where the tokenizer of a checkpoint is, on this machine: nothing is fetched.

    Args:
        directory: of the checkpoint.
        args: of the checkpoint.

    Returns:
        The copy beside the checkpoint, else the path that its run had, if that is there; None if
        it is nowhere.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    own = kept_tokenizer(directory, args)
    if own is not None or path is None or os.path.exists(path):
        return own or path
    if kind == DIRECTORY:
        return fetched_before(path)
    return None if kind in FILE else path


def fetched_before(name: str) -> str | None:
    """Where huggingface_hub keeps the repository of this name, None if it keeps none."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None


def check_tokenizer_path(args: Namespace) -> None:
    """Checks that --tokenizer-model is there, before Megatron opens it.

    Args:
        args: as parsed.

    Raises:
        UserError: it is not; names the copy beside the checkpoint that is about to be loaded.
    """
    path, kind = args.tokenizer_model, args.tokenizer_type
    is_from_checkpoint = args.use_checkpoint_args and args.use_tokenizer_model_from_checkpoint_args
    if path is None or kind not in (DIRECTORY, *FILE) or os.path.exists(path) or is_from_checkpoint:
        return
    for directory in (args.load, args.pretrained_checkpoint):
        own = directory and kept_tokenizer(directory, args)
        if own:
            raise UserError(
                f"--tokenizer-model {path} does not exist: give the copy beside the checkpoint, "
                f"--tokenizer-model {own}"
            )
    if kind in FILE:
        raise UserError(f"--tokenizer-model {path} does not exist: give the path of its file")


@contextmanager
def checkpoints_bring_tokenizers() -> Iterator[None]:
    """Context in which --use-checkpoint-args takes the tokenizer that lies beside the checkpoint.

    Megatron takes the path that the run had.
    """
    load_arguments = checkpointing.load_args_from_checkpoint

    def load_with_tokenizer(args: Namespace, load_arg: str = "load", **options: Any) -> Any:
        found = load_arguments(args, load_arg=load_arg, **options)
        directory = getattr(args, load_arg)
        if directory is not None and args.use_tokenizer_model_from_checkpoint_args:
            args.tokenizer_model = kept_tokenizer(directory, args) or args.tokenizer_model
        return found

    with replaced(checkpointing, "load_args_from_checkpoint", load_with_tokenizer):
        yield
