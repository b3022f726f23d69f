"""Rows of training data: Megatron's GPTDataset, with random numbers for each row.

Blending, splitting, shuffling and caching stay Megatron's. A row carries its clean tokens and its
random numbers, but neither its rate t nor its mask. These depend on the rate sampler, which may
change while a prefetched row waits in a loader.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.utils import Split as MegatronSplit
from megatron.training.global_vars import get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.index_cache import DatasetBuilder
from megatron_mdm.mcore.data.pair_dataset import PackedPairDataset, PairDataset, PairDatasetConfig
from megatron_mdm.mcore.data.text_dataset import (
    SPLITS,
    CleanTokensDataset,
    EpochDataset,
    MockCleanTokensDataset,
)
from megatron_mdm.mcore.data.validation_sets import ValidationSets
from megatron_mdm.mcore.flags.identities import cache_keys, share_identities
from megatron_mdm.objective.masks import syrm
from megatron_mdm.objective.quantiles import Quantiles
from megatron_mdm.objective.randomness import (
    Purpose,
    Split,
    random_bits,
    row_length,
    row_uniforms,
    to_grid,
)
from megatron_mdm.objective.views import view_uniforms

TEXT_BITS = 40  # bits for the number of a text within its file

# Rows of evaluations, and of training, validation and test; None if this rank or run has none.
type Evaluated = RowDataset | ValidationSets | None
type Datasets = tuple[RowDataset | None, Evaluated, Evaluated]


def row_columns(mdm: MDMConfig, training: bool) -> dict[str, bool]:
    """The tensors of a row; True for vectors, False for numbers. See RowDataset."""
    columns = dict.fromkeys(("num_tokens", "length", "split", "row"), False)
    columns |= {"tokens": True, "uniforms": True}
    columns["quantile"] = mdm.rate_unit != "row" if training else mdm.blocks is not None
    if not training:
        columns["text"] = False
    if mdm.sft:
        columns["maskable"] = True
        if mdm.isolate_documents:
            columns["document"] = True
    return columns


class RowDataset(torch.utils.data.Dataset):
    """Rows by their position in the run, for Megatron's `single` loader.

    A row is a dict of int64 tensors:
        tokens [L]: clean tokens, padding as `pad_id`.
        num_tokens []: positions from here on are padding.
        length []: the row ends early (--mdm-random-length-fraction), and positions from here on
            are not part of it; at least num_tokens.
        split [], row []: part of the data (objective's Split, or a named validation set's number,
            see `part_of_set`), and position in the run or the set.
        uniforms [L], quantile []: grid integers (objective/randomness.py). If documents or blocks
            have rates of their own, quantile is [L] and entry d belongs to document or block d of
            the row; entry 0 is the quantile of the row. Evaluations have one rate per block, or
            per row where rows are not divided into blocks.
        text []: in evaluations, the number of the row's text, because a text may be evaluated many
            times.
        maskable [L]: in fine-tuning, 0 at prompt tokens, else 1. Prompt tokens that SyRM picks have
            1 and are masked like response tokens.
        document [L]: in fine-tuning with isolated documents, the number of each token's pair.
            Otherwise documents end with their end-of-document token.

    With K views (--mdm-views; 2 is MIRROR) rows Ki to Ki + K - 1 are the views of draw i. They
    share one text and one quantile, and so one t; `view_uniforms` derives their uniforms from the
    draw's. Evaluations have one view per text, and always take quantiles from the lattice.

    Args:
        dataset: top-level dataset (a BlendedDataset passes its own numbers inward).
        mdm: settings of the objective.
        seed: seed of the run.
        mask_token_id: id that must not occur in the data; None: the model has no mask token.
        vocab_size: number that is larger than every id in the data.
        pad_id: id at padding positions, inside the vocabulary.
        period: for validation and test, the number of rows after which they repeat. Every
            evaluation then sees the same rows with the same masks, whatever the position of
            Megatron's loader.
        text_offset: number that is added to draws, in a run that began with another number of
            views.
    """

    def __init__(
        self,
        dataset: Any,
        mdm: MDMConfig,
        seed: int,
        mask_token_id: int | None,
        vocab_size: int,
        pad_id: int,
        period: int | None = None,
        text_offset: int = 0,
    ) -> None:
        self.dataset = dataset
        # Megatron's loader uses the evaluation batch size for the splits `valid` and `test`.
        self.split = getattr(dataset, "split", None) or dataset.index_split
        self.mdm = mdm
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.period = period
        self.text_offset = text_offset
        split = SPLITS[self.split]
        self.training = split is Split.TRAIN
        if self.training:
            self.views = mdm.views
            # --mdm-strata-window counts rows, but quantiles belong to draws.
            window = (mdm.strata_window or self.views) // self.views
            strata = mdm.strata or 1
            self.quantiles = Quantiles(mdm.quantiles, seed, split, window, strata)
        else:
            self.views = 1
            self.quantiles = Quantiles("lattice", seed, split)

    def __len__(self) -> int:
        # Evaluation rows repeat without end. Sums with 2^62 still fit into int64.
        if self.period:
            return 2**62
        return (len(self.dataset) - self.text_offset) * self.views

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Several files without weights hold each text once. If an evaluation takes more rows, it
        # takes the first ones again, under the same masks.
        row = index % self.period % len(self.dataset) if self.period else index
        draw, view = divmod(row, self.views)
        draw += self.text_offset
        item = self.dataset[draw]
        tokens = torch.from_numpy(item["tokens"])
        length = self._length(draw, len(tokens))
        num_tokens = min(int(item["num_tokens"]), length)
        tokens[num_tokens:] = self.pad_id
        self._check_ids(row, draw, tokens[:num_tokens].numpy())
        uniforms = row_uniforms(self.seed, self.quantiles.split, draw, len(tokens))
        if self.views > 1:
            uniforms = view_uniforms(uniforms, view, self.views)
        columns = {
            "tokens": tokens,
            "num_tokens": torch.tensor(num_tokens),
            "length": torch.tensor(length),
            "split": torch.tensor(int(self.quantiles.split)),
            "row": torch.tensor(row),
            "uniforms": torch.from_numpy(uniforms),
            "quantile": torch.tensor(self.quantiles(draw)),
        }
        is_vector = row_columns(self.mdm, self.training)
        if not self.training:
            number = item.get("dataset_id", 0), item.get("text", draw)
            columns["text"] = torch.tensor((int(number[0]) << TEXT_BITS) + int(number[1]))
        if is_vector["quantile"]:
            columns["quantile"] = torch.from_numpy(self.quantiles.of_documents(draw, len(tokens)))
        if "maskable" in is_vector:
            maskable = ~item["prompt"] | self._syrm(draw, item["tokens"])
            columns["maskable"] = torch.from_numpy(maskable.astype(np.int64))
        if "document" in is_vector:
            columns["document"] = torch.from_numpy(item["document"])
        return columns

    def _length(self, draw: int, longest: int) -> int:
        """The length of a row that may end early. Only training rows do."""
        fraction = self.mdm.random_length_fraction
        if not (self.training and fraction):
            return longest
        return row_length(self.seed, Split.TRAIN, draw, longest, fraction)

    def _syrm(self, draw: int, tokens: np.ndarray) -> np.ndarray:
        """Tokens that SyRM makes eligible in a prompt, bool [L]; none outside training."""
        if not self.training:
            return np.zeros(len(tokens), dtype=bool)
        return syrm(
            tokens,
            tuple(self.mdm.syrm_token_ids or ()),
            self.mdm.syrm_fraction,
            to_grid(random_bits(self.seed, Split.TRAIN, Purpose.SYRM, draw, len(tokens))),
        )

    def _check_ids(self, row: int, draw: int, tokens: np.ndarray) -> None:
        is_mask = tokens == self.mask_token_id
        is_beyond = (tokens < 0) | (tokens >= self.vocab_size)
        if not (is_mask | is_beyond).any():
            return
        place = int((is_mask | is_beyond).argmax())
        where = f"row {row} of the {self.split.name} data contains"
        file = f"at position {place} ({self._path(draw)})"
        if is_mask[place]:
            raise UserError(
                f"{where} the mask token {self.mask_token_id} {file}: the model would treat it as "
                "a masked position. Tokenize the data again, or give another --mdm-mask-token-id"
            )
        raise UserError(
            f"{where} the token {tokens[place]} {file}, and the vocabulary has {self.vocab_size} "
            "tokens: tokenize the data with the run's tokenizer"
        )

    def _path(self, draw: int) -> str:
        """The .bin/.idx pair that a draw comes from."""
        dataset = self.dataset
        if hasattr(dataset, "datasets"):
            dataset = dataset.datasets[int(dataset.dataset_index[draw])]
        return str(dataset.dataset_path)


def datasets_provider(
    args: Namespace, mdm: MDMConfig
) -> Callable[[list[int], int | None], Datasets]:
    """Megatron's `train_valid_test_dataset_provider`, a function that builds the three datasets.

    The function takes the numbers of rows of training, all evaluations and the test, and the
    virtual pipeline stage.

    Args:
        args: arguments of the run; the function reads them when it is called.
        mdm: settings of the objective.
    """

    def provide(num_samples: list[int], vp_stage: int | None = None) -> Datasets:
        # Megatron has loaded the checkpoint and builds its loaders next. Evaluation rows repeat, so
        # the first evaluation may begin with the first of them. It must, because block sizes follow
        # from the number of a batch, and the former evaluations may have had other sizes.
        args.consumed_valid_samples = 0
        of_size = args.eval_iters * args.eval_global_batch_size // len(mdm.evaluated_sizes)
        of_set = of_size // len(args.mdm_validation_sets or [None])
        return build_datasets(args, mdm, [num_samples[0], of_set, of_size], vp_stage)

    # Megatron then calls it on every rank, and `loads_rows` decides which ranks load rows.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def build_datasets(
    args: Namespace,
    mdm: MDMConfig,
    num_rows: list[int],
    vp_stage: int | None = None,
    on_all_ranks: bool = False,
) -> Datasets:
    """Builds the training, validation and test datasets.

    Args:
        args: arguments of the run.
        mdm: settings of the objective.
        num_rows: number of rows of each of the three. With named validation sets, the second number
            is the number of rows of each set. With --mdm-eval-block-sizes the second and the third
            are those of one size.
        vp_stage: virtual pipeline stage.
        on_all_ranks: whether every rank builds them, not only ranks that load rows in training.

    Raises:
        UserError: a split is shorter than one row, or the data have too few rows for the run.
    """
    share_identities(args)
    dataset_config = _dataset_config(args, mdm)
    train, valid, test = num_rows
    offset = getattr(args, "mdm_text_offset", 0)
    texts = -(-train // mdm.views) + offset
    is_built = on_all_ranks or loads_rows(mdm, vp_stage)
    datasets = DatasetBuilder(
        _dataset_class(args, mdm), [texts, valid, test], lambda: is_built, dataset_config
    ).build()
    if datasets[0] is not None and len(datasets[0]) < texts:
        raise UserError(
            f"the run takes {texts} texts and --data-path has {len(datasets[0])}: several files "
            "without weights are read only once; give a weight before each file, or train for "
            "fewer iterations"
        )
    sets = datasets[1] if isinstance(datasets[1], list) else [datasets[1]]
    parts = ("training", datasets[0], train), *(("validation", part, valid) for part in sets)
    for name, dataset, rows in parts:
        if is_built and dataset is None and rows:
            raise UserError(
                f"the {name} data have no rows: --split {args.split} leaves them no document. Give "
                "them a larger share, or more data"
            )
    if datasets[0] is not None and not args.mock_data and not vp_stage:
        _print_epochs(datasets[0], texts, mdm.views)
    # After a response, the row continues with end-of-document tokens (LLaDA, arXiv 2502.09992).
    pad = dataset_config.tokenizer.eod if mdm.sft else pad_id(dataset_config.tokenizer)

    def rows_of(dataset: Any, period: int | None, first: int = 0) -> RowDataset | None:
        if dataset is None or period == 0:  # Megatron makes no loader for a mixture without rows
            return None
        return _rows(args, mdm, dataset, pad, period, first)

    evaluated: Evaluated = rows_of(sets[0], valid)
    tested: Evaluated = rows_of(datasets[2], test)
    sizes = mdm.evaluated_sizes
    by_size = mdm.eval_block_sizes is not None
    if evaluated is not None and (by_size or dataset_config.multiple_validation_sets):
        evaluated = ValidationSets(
            [rows_of(dataset, valid) for _ in sizes for dataset in sets], valid
        )
    if tested is not None and by_size:
        tested = ValidationSets([tested] * len(sizes), test, first=len(sizes) * len(sets))
    return rows_of(datasets[0], None, offset), evaluated, tested


def rows_of_file(args: Namespace, mdm: MDMConfig, prefix: str) -> RowDataset:
    """All pairs of one file as an unsplit training dataset on every rank; --mdm-sft only.

    Raises:
        UserError: no pair is short enough.
    """
    config = _dataset_config(args, mdm)
    kind = _dataset_class(args, mdm)
    indexed = kind.build_low_level_dataset(prefix, config)
    pairs = np.arange(kind.numel_low_level_dataset(indexed))
    dataset = kind(indexed, prefix, pairs, None, MegatronSplit.train, config)
    return _rows(args, mdm, dataset, config.tokenizer.eod)


def _rows(
    args: Namespace,
    mdm: MDMConfig,
    dataset: Any,
    pad: int,
    period: int | None = None,
    text_offset: int = 0,
) -> RowDataset:
    assert mdm.vocab_size is not None  # after `finalize_args`
    mask, size = mdm.mask_token_id, mdm.vocab_size
    return RowDataset(dataset, mdm, args.seed, mask, size, pad, period, text_offset)


def epochs(dataset: Any, texts: int) -> Iterator[tuple[str, float, int]]:
    """How often a run passes over its data.

    Args:
        dataset: a dataset without views, or Megatron's mixture of such datasets.
        texts: texts of the run.

    Yields:
        The path of a part of the data, the texts that the run takes from it, and the texts of one
        epoch of it.
    """
    parts = getattr(dataset, "datasets", [dataset])
    weights = dataset.weights if len(parts) > 1 else [1.0]
    for part, weight in zip(parts, weights, strict=True):
        yield str(part.dataset_path), texts * weight / sum(weights), part.texts_per_epoch


def _print_epochs(dataset: Any, texts: int, views: int) -> None:
    """Prints how often training passes over its data; each text becomes `views` rows."""
    for path, share, of_epoch in epochs(dataset, texts):
        of_each = f", {views} views of each of {share:.0f}," if views > 1 else ""
        print_rank_0(
            f" > training takes {share * views:.0f} rows{of_each} from {path}: "
            f"{share / of_epoch:.2f} epochs of {of_epoch} rows"
        )


def _dataset_class(args: Namespace, mdm: MDMConfig) -> Any:
    if args.mock_data:
        return MockCleanTokensDataset
    if mdm.sft:
        return PackedPairDataset if mdm.isolate_documents else PairDataset
    return CleanTokensDataset if mdm.row_order == "run" else EpochDataset


def loads_rows(mdm: MDMConfig, vp_stage: int | None) -> bool:
    """Whether this rank loads rows: tensor rank 0 of the stages that need them."""
    return mpu.get_tensor_model_parallel_rank() == 0 and needs_rows(mdm, vp_stage)


def needs_rows(mdm: MDMConfig, vp_stage: int | None) -> bool:
    """Whether this stage needs rows: the first for its input, the last for the loss.

    Stages between them need rows too if the attention mask depends on the tokens.
    """
    return (
        not mdm.attends_everywhere
        or mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    )


def pad_id(tokenizer: Any) -> int:
    """The id at padding positions: the tokenizer's padding token, else its end of document."""
    for name in ("pad", "eod"):
        value = getattr(tokenizer, name, None)
        if value is not None and value >= 0:
            return value
    return 0


def _dataset_config(args: Namespace, mdm: MDMConfig) -> PairDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return PairDatasetConfig(
        response_multiple=mdm.pad_response_to_multiple_of,
        cache_keys=cache_keys(args),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        multiple_validation_sets=bool(getattr(args, "mdm_validation_sets", None)),
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        # No token is predicted from its predecessor, so rows have L tokens and no extra one.
        add_extra_token_to_sequence=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
