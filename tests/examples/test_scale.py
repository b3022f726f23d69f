"""Communication of our own code: the numbers of examples/scale/README.md."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from megatron.core import mpu
from megatron.training import get_args

from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.data import row_dataset
from megatron_mdm.mcore.flags import data_files
from megatron_mdm.pretrain import main
from tests import ROOT, ranks
from tests.ranks.gathering_attention import gathered_attention

ROW_LENGTH, BINS, RATE_BINS = 32, 30, 10
REFIT = [("all_reduce", 32 * (4 * BINS + 1)), ("all_reduce", 16)]
LOG = [("all_reduce", 8 * 3 * (3 * RATE_BINS + 6)), ("all_reduce", 8)]
STOP = [("all_reduce", 4)]  # whether a rank was asked to stop, after each step


def context_parallel_traffic() -> None:
    """Runs `traffic` under context parallelism."""
    with gathered_attention():
        traffic()


def traffic() -> None:
    """Runs the program, and counts the collective calls that our own code makes on this rank.

    It saves a list of (iteration, function, bytes of the tensor, ranks of the group), one per call.
    On all tensor-parallel ranks but the first, it changes the last bits of what P-POTS measured, as
    another order of reductions might.
    """
    from torch import distributed

    from megatron_mdm.mcore.training.ppots import OnlineSampler

    calls = []
    reduce = OnlineSampler.reduce

    def reduce_otherwise(self):
        if self.measured is not None and mpu.get_tensor_model_parallel_rank() > 0:
            self.measured = self.measured.clone()
            self.measured[0] += 1 << 20  # in units of 2^-70
        reduce(self)

    OnlineSampler.reduce = reduce_otherwise

    def counted(name):
        function = getattr(distributed, name)

        def count(*args, **kwargs):
            if f"{os.sep}megatron_mdm{os.sep}" in sys._getframe(1).f_code.co_filename:
                size = sum(a.numel() * a.element_size() for a in args if torch.is_tensor(a))
                ranks = distributed.get_world_size(kwargs.get("group"))
                iteration = getattr(get_args(), "curr_iteration", -1)
                calls.append((iteration, name, size, ranks))
            return function(*args, **kwargs)

        return count

    for name in dir(distributed):
        sends = name.startswith(
            ("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv")
        )
        if sends and callable(getattr(distributed, name)):
            setattr(distributed, name, counted(name))
    main()
    path = Path(os.environ["TRACE_DIR"], f"calls{os.environ['RANK']}.json")
    path.write_text(json.dumps(calls))


def calls_of(directory, data, world, *flags, entry=traffic):
    """Runs `entry`: (iteration, rank) -> [(function, bytes)] of its calls."""
    ranks.launch(
        directory,
        world,
        *["--data-path", str(data), "--data-cache-path", str(directory / "cache")],
        *"--mdm-recipe ppots --mdm-ppots-refit-interval 2".split(),
        *f"--mdm-ppots-bins {BINS} --global-batch-size 64 --train-iters 4".split(),
        *"--log-interval 4".split(),
        *flags,
        entry=entry,
    )
    found = {}
    for rank in range(world):
        for iteration, name, size, _ in json.loads((directory / f"calls{rank}.json").read_text()):
            found.setdefault((iteration, rank), []).append((name, size))
    return found


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_bytes_of_a_rank_do_not_depend_on_the_number_of_ranks(tmp_path, data, world):
    calls = calls_of(tmp_path, data, world)
    for rank in range(world):
        # Masks, rates and rows need no communication.
        assert calls[0, rank] == calls[2, rank] == STOP
        # At 64 rows a step, all 30 bins are filled by the fourth step: ranks compare their fits.
        assert calls[1, rank][0] == REFIT[0]
        assert Counter(calls[3, rank]) == Counter(REFIT + LOG + STOP)


def test_tensor_ranks_get_rows_by_one_message_and_model_ranks_the_moments_by_another(
    tmp_path, data
):
    """The ranks' own moments differ in the last bits here, and yet all fit the same density."""
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    calls = calls_of(tmp_path, data, 4, *layout)
    rows = [("broadcast", 8 * 2 * (2 * ROW_LENGTH + 5))] * 32  # micro-batches of 2 rows
    moments = [("broadcast", REFIT[0][1])]
    for rank in range(4):
        is_last_stage = rank >= 2
        assert calls[0, rank] == rows + STOP
        at_refit = Counter(calls[3, rank])
        assert at_refit >= Counter(rows + moments)
        assert (REFIT[0] in at_refit) == (rank == 2)  # the first tensor-parallel rank
        assert (at_refit >= Counter(LOG)) == is_last_stage
        # Gradient norms are sums over the stage's whole hidden states, which all its ranks have.
        assert at_refit - Counter(rows + moments + REFIT + LOG + STOP) == Counter()


def test_context_ranks_add_losses_and_norms_of_rows_or_documents(tmp_path, data):
    """Two sums per micro-batch, which are s times as long with rates per document."""
    flags = ["--context-parallel-size", "2", "--mdm-rate-per", "document"]
    calls = calls_of(tmp_path, data, 2, *flags, entry=context_parallel_traffic)
    sums = [("all_reduce", 4 * 2 * ROW_LENGTH)] * 2 * 32  # 32 micro-batches of 2 rows
    for rank in range(2):
        assert calls[0, rank] == sums + STOP
        assert Counter(calls[1, rank]) - Counter(sums) == Counter(REFIT + STOP)


def test_bytes_of_rows_follow_from_their_columns():
    for settings, numbers in (
        ({}, 2 * ROW_LENGTH + 5),
        ({"rate_per": "document"}, 3 * ROW_LENGTH + 4),
        ({"sft": True}, 3 * ROW_LENGTH + 5),
        (
            {"rate_per": "document", "isolate_documents": True, "sft": True},
            5 * ROW_LENGTH + 4,
        ),
    ):
        columns = row_dataset.row_columns(MDMConfig(**settings), training=True)
        assert sum(ROW_LENGTH if vector else 1 for vector in columns.values()) == numbers


def test_stages_between_need_rows_where_attention_does_not_reach_everywhere(monkeypatch):
    for end in ("first", "last"):
        monkeypatch.setattr(row_dataset.mpu, f"is_pipeline_{end}_stage", lambda **_: False)
    assert not row_dataset.needs_rows(MDMConfig(rate_per="document"), None)
    assert row_dataset.needs_rows(MDMConfig(isolate_documents=True), None)
    assert row_dataset.needs_rows(MDMConfig(random_length_fraction=0.01), None)


def test_the_page_has_these_numbers():
    page = (ROOT / "examples/scale/README.md").read_text()
    for number in (REFIT[0][1], REFIT[1][1], LOG[0][1], LOG[1][1]):
        assert f" {number} " in page
    for formula in ("8 b (2s + 5)", "8 b (3s + 4)", "another 8 b s", "8 b s more", "4 b s each"):
        assert formula in page


def test_only_the_first_rank_reads_whole_indices(tmp_path, monkeypatch):
    prefix = tmp_path / "text"
    ranks.write_documents(prefix, ranks.random_documents(20))
    monkeypatch.setattr(data_files, "INDEX_PART", 8)
    index = Path(f"{prefix}.idx")
    size = Path(f"{prefix}.bin").stat().st_size
    for rank in ("0", "5"):
        monkeypatch.setenv("RANK", rank)
        assert data_files.indexed_bytes(str(index)) == size
    whole = index.read_bytes()
    lengths = len(whole) - 20 * 12 - 21 * 8  # start of the lengths
    for sequence, seen_by_all in ((1, False), (18, True)):
        place = lengths + 4 * sequence
        index.write_bytes(whole[:place] + bytes([whole[place] + 1]) + whole[place + 1 :])
        for rank in ("0", "5"):
            monkeypatch.setenv("RANK", rank)
            if rank == "0" or seen_by_all:
                with pytest.raises(ValueError, match="lengths and positions differ"):
                    data_files.indexed_bytes(str(index))
            else:
                assert data_files.indexed_bytes(str(index)) == size
