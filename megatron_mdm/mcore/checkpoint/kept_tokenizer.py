"""The tokenizer that a run keeps beside its checkpoints, so that their directory can move.

The copy is `huggingface/`, as a conversion writes it, or `tokenizer.model` and its like, a single
file. A run replaces a copy that an earlier one has left, and nothing else that lies at its place.
tokenizer_lookup.py finds it again.
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
# Types whose tokenizer is one file.
FILE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
# What belongs to a tokenizer in a directory of Hugging Face, which may hold weights and data too:
# the files that classes of transformers name, config.json, which it reads for them, and the code,
# card and license of the model, which go back with it to Hugging Face. Further templates lie in a
# directory of their own.
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
        source: the file or directory that they are.
        name: of the copy in a directory of checkpoints.
        sums: file -> SHA-256 when the run began.
    """

    source: Path
    name: str
    sums: dict[Path, str]

    def keep(self, directory: Path) -> None:
        """Puts a copy into a directory of checkpoints, complete or not at all, unless it is there.

        A directory that a conversion made keeps its own, which may have a mask token more. No copy
        is made, and a line says so, if the tokenizer has changed or gone since the run began, or if
        something else has come to lie at the place of the copy.

        Raises:
            UserError: it cannot be written.
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
        """Checks that a copy in a directory of checkpoints would replace nothing but a copy.

        Raises:
            UserError: it would; names what lies there.
        """
        target = directory / self.name
        foreign = "" if self._needs_none(target) else _foreign(target)
        if foreign:
            raise UserError(
                f"--save {directory}: {foreign}, and the run keeps the copy of its tokenizer in "
                f"{target}: move what is there to another place, or give another --save"
            )

    def _needs_none(self, target: Path) -> bool:
        """Whether what lies at the place of the copy is the tokenizer, or a conversion's own."""
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
        """Where the copy of a file is."""
        return target / path.relative_to(self.source)


def _foreign(target: Path) -> str:
    """Says what lies at the place of a copy and is no copy of a run, empty if nothing does."""
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
    """What belongs to a tokenizer in a directory of Hugging Face, sorted."""
    found = [path for path in directory.iterdir() if _belongs(path)]
    return sorted([*found, *(directory / CHAT_TEMPLATES).glob("*.jinja")])


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
        UserError: a file cannot be read, or something else lies where their copy goes.
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
    """Where the tokenizer of a run, which has files, lies beside its checkpoints if it does.

    Args:
        directory: that --save named.
        args: of the run.
    """
    return os.path.join(directory, _name(args.tokenizer_type, args.tokenizer_model))


def _name(kind: str, path: str) -> str:
    """Names the copy of a tokenizer of this type and path."""
    return HUB_FILES if kind == DIRECTORY else f"tokenizer{Path(path).suffix}"


def fetched_before(name: str) -> str | None:
    """Where huggingface_hub keeps the repository of this name, None if it keeps none."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
