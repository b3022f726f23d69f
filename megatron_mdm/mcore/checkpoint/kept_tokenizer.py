"""Keeps a copy of the tokenizer beside a run's checkpoints, so that their directory can be moved.

The copy is the directory `huggingface/`, as a conversion writes it, or one file such as
`tokenizer.model`. A run replaces the copy of an earlier run, but nothing else at that path.
tokenizer_lookup.py finds the copy again.
"""

import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile

from megatron_mdm.data.record import file_digest, read_errors
from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, new_directory, set_aside, write_errors
from megatron_mdm.hub_files import CHAT_TEMPLATES, HUB_FILES
from megatron_mdm.mcore.checkpoint.files import RELEASE, TRACKER, is_remote
from megatron_mdm.mcore.ranks import is_first_rank, notice

DIRECTORY = "HuggingFaceTokenizer"
# Tokenizer types that consist of one file.
FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
# The tokenizer's files in a Hugging Face directory, which may also hold weights and data: files
# that the tokenizer classes of transformers name; config.json, which transformers reads with them;
# and the model's code, card and license, which a conversion back to Hugging Face needs.
# Additional chat templates are in a subdirectory.
NAMES = """
*token*.json *vocab*.json *vocab*.txt chat_template*.json config.json generation_config.json *.jinja
*.model *.spm *.tiktoken *.tokenizer tekken*.json merges.txt bpe.codes dict.txt normalizer.json
emoji.json byte_maps.json word_*.json *.py README* LICENSE* NOTICE*
""".split()
MOST_BYTES = 10**9


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a run's tokenizer.

    Attributes:
        source: the tokenizer's file or directory.
        name: name of the copy in a directory of checkpoints.
        sums: SHA-256 of each file when the run began.
    """

    source: Path
    name: str
    sums: dict[Path, str]

    def keep(self, directory: Path) -> None:
        """Puts a complete copy into a directory of checkpoints, unless the copy is already there.

        A directory that a conversion made keeps its own tokenizer, which may have an additional
        mask token. No copy is made, and a line says so, if the tokenizer was changed or removed
        since the run began, or if something else is at the path of the copy.

        Raises:
            UserError: the copy cannot be written.
        """
        target = directory / self.name
        if self._needs_none(target):
            return
        if not _are(self.sums):
            notice(
                f"the tokenizer {self.source} is not what it was when the run began: no copy of it "
                f"goes into {directory}"
            )
            return
        foreign = _foreign(target)
        if foreign:
            notice(f"{foreign}: no copy of the tokenizer {self.source} goes there")
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
                copy = self._copy(path, Path(temporary))
                copy.parent.mkdir(exist_ok=True)
                copyfile(path, copy)

    def check_place(self, directory: Path) -> None:
        """Checks that the path of the copy in a directory of checkpoints is free or holds a copy.

        Raises:
            UserError: something else is at that path; the line names it.
        """
        target = directory / self.name
        foreign = "" if self._needs_none(target) else _foreign(target)
        if foreign:
            raise UserError(
                f"--save {directory}: {foreign}, and the run keeps the copy of its tokenizer in "
                f"{target}: move the present contents to another place, or give another --save"
            )

    def _needs_none(self, target: Path) -> bool:
        """Whether no copy is needed: the path holds this tokenizer, or that of a conversion."""
        if target.exists():
            is_converted = (target.parent / RELEASE).is_dir()
            if is_converted or (self.source.exists() and target.samefile(self.source)):
                return True
        copies = {self._copy(path, target): expected for path, expected in self.sums.items()}
        if target.is_dir():
            with read_errors(target):
                if set(files_of_tokenizer(target)) != copies.keys():
                    return False
        return _are(copies)

    def _copy(self, path: Path, target: Path) -> Path:
        """The path of a file's copy."""
        return target / path.relative_to(self.source)


def _foreign(target: Path) -> str:
    """Describes anything at the path of a copy that is not a run's copy; empty if there is none."""
    if not os.path.lexists(target):
        return ""
    if target.is_symlink():
        return f"{target} is a link"
    if not (target.parent / TRACKER).exists():
        return f"{target} is there, with other contents, before any checkpoint is"
    if target.is_dir() != (target.name == HUB_FILES):
        return f"{target} is a {'directory' if target.is_dir() else 'file'}"
    if target.is_dir():
        with read_errors(target):
            own = {target / CHAT_TEMPLATES, *files_of_tokenizer(target)}
            below = [*target.iterdir(), *(target / CHAT_TEMPLATES).glob("*")]
        for path in sorted(below):
            if path not in own or (path == target / CHAT_TEMPLATES and not path.is_dir()):
                return f"{path} is no tokenizer's file"
    return ""


def files_of_tokenizer(directory: Path) -> list[Path]:
    """The tokenizer's files in a Hugging Face directory, sorted."""
    found = [path for path in directory.iterdir() if _belongs(path)]
    return sorted([*found, *(directory / CHAT_TEMPLATES).glob("*.jinja")])


def _are(sums: Mapping[Path, str]) -> bool:
    """Whether all files exist and have these checksums."""
    try:
        return all(file_digest(str(path)) == expected for path, expected in sums.items())
    except OSError:
        return False


def tokenizer_files(args: Namespace) -> TokenizerFiles | None:
    """The files of the tokenizer that a run has loaded, on the first rank.

    Args:
        args: arguments of the run.

    Returns:
        None on other ranks, if the run does not save, for a tokenizer without files, and for files
        of more than `MOST_BYTES`, too many for a tokenizer.

    Raises:
        UserError: a file cannot be read, or something else is at the path of the copy.
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
            files = files_of_tokenizer(source)
    with read_errors(source):
        size = sum(path.stat().st_size for path in files)
        if size > MOST_BYTES:
            notice(
                f"the tokenizer {path} has {size / 1e9:.1f} GB of files: no copy of it goes into "
                f"{args.save}"
            )
            return None
        sums = {path: file_digest(str(path)) for path in files}
    found = TokenizerFiles(source, _name(kind, path), sums)
    found.check_place(Path(args.save))
    return found


def _belongs(path: Path) -> bool:
    names = any(fnmatch(path.name, pattern) for pattern in NAMES)
    return names and not path.name.startswith(".") and path.is_file()


def place_of_tokenizer(directory: str, args: Namespace) -> str:
    """The path of the copy of a run's tokenizer beside its checkpoints, whether it exists or not.

    Args:
        directory: directory that --save named.
        args: arguments of the run, whose tokenizer has files.
    """
    return os.path.join(directory, _name(args.tokenizer_type, args.tokenizer_model))


def _name(kind: str, path: str) -> str:
    """The name of the copy of a tokenizer with this type and path."""
    return HUB_FILES if kind == DIRECTORY else f"tokenizer{Path(path).suffix}"


def fetched_before(name: str) -> str | None:
    """The directory where huggingface_hub caches the repository `name`; None if it does not."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
