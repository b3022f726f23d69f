"""The tokenizer that a run keeps beside its checkpoints, so that their directory can move.

A checkpoint's arguments name the tokenizer by its path. On another machine, or once the original
has gone, that path names nothing, or something else. The copy in the directory of the checkpoints
is therefore what is looked for first: `huggingface/`, as a conversion writes it, or
`tokenizer.model` and its like, a single file. A run replaces a copy that an earlier one has left,
and nothing else that lies at its place.
"""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from typing import Any

from megatron.training import checkpointing

from megatron_mdm.data.encoding import TokenizerData, hugging_face_data, open_hugging_face
from megatron_mdm.data.fingerprint import Fingerprint, differs
from megatron_mdm.data.preprocess import load_sentencepiece
from megatron_mdm.data.record import file_digest, read_errors
from megatron_mdm.errors import UserError
from megatron_mdm.files import complete_or_absent, new_directory, set_aside, write_errors
from megatron_mdm.hub_files import CHAT_TEMPLATES, HUB_FILES
from megatron_mdm.mcore.checkpoint.files import RELEASE, TRACKER, is_remote
from megatron_mdm.mcore.device import replaced
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
                if set(_files(target)) != copies.keys():
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
            own = {target / CHAT_TEMPLATES, *_files(target)}
            below = [*target.iterdir(), *(target / CHAT_TEMPLATES).glob("*")]
        for path in sorted(below):
            if path not in own or (path == target / CHAT_TEMPLATES and not path.is_dir()):
                return f"{path} is no tokenizer's file"
    return ""


def _files(directory: Path) -> list[Path]:
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
            files = _files(source)
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


def kept_tokenizer(directory: str, args: Namespace) -> str | None:
    """The tokenizer that lies beside checkpoints, None if there is none.

    A run that was allowed to change its tokenizer has replaced the copy. For a checkpoint from
    before, whose tokenizer still is at its path, the copy does not count.

    Args:
        directory: that --save named.
        args: of one of its checkpoints, or of a run with such a tokenizer.
    """
    kind, path = args.tokenizer_type, args.tokenizer_model
    if path is None or kind not in (DIRECTORY, *FILE) or is_remote(directory):
        return None
    own = place_of_tokenizer(directory, args)
    is_there = os.path.isdir if kind == DIRECTORY else os.path.isfile
    if not is_there(own):
        return None
    saved = getattr(args, "mdm_tokenizer", None)
    original = path if os.path.exists(path) or kind != DIRECTORY else fetched_before(path)
    if saved is None or original is None or not is_there(original) or _same(own, original):
        return own
    trained_with = Fingerprint(**saved)
    copy, other = _data(own), _data(original)
    is_replaced = copy is not None and differs(trained_with, copy)
    is_original = other is not None and not differs(trained_with, other)
    return None if is_replaced and is_original else own


def _same(one: str, other: str) -> bool:
    """Whether two tokenizers, both files or both directories, are alike byte for byte."""
    if os.path.isfile(one):
        return cmp(one, other, shallow=False)
    first, second = ({p.relative_to(x): p for p in _files(Path(x))} for x in (one, other))
    return first.keys() == second.keys() and all(
        cmp(path, second[name], shallow=False) for name, path in first.items()
    )


def _data(path: str) -> TokenizerData | None:
    """A tokenizer as preprocessing knows it, None if it does not know it; no code there runs."""
    if os.path.isfile(path):
        with suppress(UserError):
            return load_sentencepiece(path)
        return None
    try:
        tokenizer = open_hugging_face(path)
    except Exception:  # of many kinds; whoever then opens the one that is chosen says what is wrong
        return None
    return hugging_face_data(tokenizer) if tokenizer.is_fast else None


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
    """Checks, before Megatron opens it, that --tokenizer-model is there or may be on the hub.

    Args:
        args: as parsed.

    Raises:
        UserError: it is not; names the copy beside the checkpoint that is about to be loaded.
    """
    path, kind = args.tokenizer_model, args.tokenizer_type
    is_from_checkpoint = args.use_checkpoint_args and args.use_tokenizer_model_from_checkpoint_args
    if path is None or kind not in (DIRECTORY, *FILE) or os.path.exists(path) or is_from_checkpoint:
        return
    if kind == DIRECTORY and _may_be_on_hub(path):
        return
    own = _copy_to_load(args)
    if own:
        raise UserError(
            f"--tokenizer-model {path} does not exist: give the copy beside the checkpoint, "
            f"--tokenizer-model {own}"
        )
    if kind in FILE:
        raise UserError(f"--tokenizer-model {path} does not exist: give the path of its file")


def tokenizer_rejection(error: Exception, args: Namespace) -> UserError | None:
    """One line for an exception of Megatron about a --tokenizer-model that is no path.

    Args:
        error: that Megatron raised.
        args: as parsed.

    Returns:
        None if the exception is about something else, or there is no copy to be named.
    """
    path = args.tokenizer_model
    is_about_it = path is not None and f"AutoTokenizer for {path}." in str(error)
    own = _copy_to_load(args) if is_about_it and not os.path.exists(path) else None
    if own is None:
        return None
    return UserError(
        f"--tokenizer-model {path} does not exist, and transformers finds no tokenizer of this "
        f"name: give the copy beside the checkpoint, --tokenizer-model {own}"
    )


def _may_be_on_hub(path: str) -> bool:
    try:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(path)
    except (ImportError, ValueError):
        return False
    return True


def _copy_to_load(args: Namespace) -> str | None:
    """The copy beside the checkpoint that a run is about to load, None if there is none."""
    places = (args.load, args.pretrained_checkpoint)
    found = (kept_tokenizer(place, args) for place in places if place)
    return next((own for own in found if own), None)


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
            saved = found[1] if isinstance(found, tuple) else None  # there is no checkpoint
            trained_with = getattr(saved, "mdm_tokenizer", None)
            own = kept_tokenizer(
                directory, Namespace(**vars(args) | {"mdm_tokenizer": trained_with})
            )
            args.tokenizer_model = own or args.tokenizer_model
        return found

    with replaced(checkpointing, "load_args_from_checkpoint", load_with_tokenizer):
        yield
