"""Decoding in blocks: cached and uncached logits are those that training computes."""

import itertools
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mdm.checkpoint import open_checkpoint
from tests import ranks
from tests.ranks import entries

LAYOUTS = {"1 rank": (1, 1), "TP 2": (2, 1), "PP 2": (2, 2)}
SIZE, LENGTH = 4, 14  # the last block is short
SETTINGS = list(itertools.product((False, True), (0.0, 1.0), (True, False)))


def logits_of_a_text():
    """Writes the logits of all blocks of three texts: as in training, with a cache, and without."""
    from megatron_mdm.mcore.inference.block_logits import BlockLogits

    checkpoint, stages, directory = sys.argv[-3:]
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(1, 100, (3, LENGTH), generator=generator)
    clean[0, 5] = clean[1, 0] = ranks.EOD_ID
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.6, ranks.MASK_ID)
    noisy[:, 0] = clean[:, 0]  # a shifted model does not predict the first token
    found = {}
    with open_checkpoint(checkpoint, "cpu", int(stages), block_size=str(SIZE)) as opened:
        assert opened.block_size == SIZE
        for shift, weight, attended in SETTINGS:
            args = copy(opened.args)
            args.mdm_shift, args.mdm_ar_loss_weight, args.mdm_eod_attended = shift, weight, attended
            loaded = replace(opened, args=args)
            parts = [loaded.logits(noisy, clean, torch.zeros_like(clean))]
            for cached in (True, False):
                logits = BlockLogits(loaded, LENGTH, cached)
                blocks = []
                for start in range(0, LENGTH, SIZE):
                    text = torch.cat([clean[:, :start], noisy[:, start : start + SIZE]], dim=1)
                    logits(text.masked_fill(text == ranks.MASK_ID, 7))  # leaves nothing behind
                    blocks.append(logits(text))
                parts.append(torch.cat(blocks, dim=1))
                # A prompt may have several blocks.
                late = BlockLogits(loaded, LENGTH, cached)(text)
                torch.testing.assert_close(late, blocks[-1], rtol=1e-5, atol=1e-5)
            found[shift, weight, attended] = parts, noisy == ranks.MASK_ID
        rank = opened.args.rank
    torch.save(found, Path(directory, f"logits{rank}.pt"))


@pytest.fixture(scope="module")
def logits(base, tmp_path_factory):
    """Layout -> what each rank wrote."""
    found = {}
    checkpoint = base[base.index("--load") + 1]
    for layout, (world, stages) in LAYOUTS.items():
        directory = tmp_path_factory.mktemp("logits")
        words = ["--", checkpoint, str(stages), str(directory)]
        ranks.launch(directory, world, *words, entry=logits_of_a_text)
        found[layout] = [torch.load(directory / f"logits{rank}.pt") for rank in range(world)]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_those_of_training(logits, layout, settings):
    (expected, _, _), masked = logits["1 rank"][0][settings]
    for of_rank in logits[layout]:
        (whole, cached, uncached), _ = of_rank[settings]
        for found in (whole, cached, uncached):
            torch.testing.assert_close(found[masked], expected[masked], rtol=1e-5, atol=1e-5)


def test_settings_matter(logits):
    found = logits["1 rank"][0]
    for one, other in itertools.combinations(SETTINGS, 2):
        masked = found[one][1]
        assert not torch.allclose(found[one][0][1][masked], found[other][0][1][masked], atol=1e-3)


def generate(base, directory, *flags, world=1):
    checkpoint = base[base.index("--load") + 1]
    command = ["tools/generate.py", "--device", "cpu", "--load", checkpoint, *flags]
    ranks.launch(directory, world, "--", *command, entry=entries.tool)
    return (directory / "stdout0").read_text()


def test_texts_are_the_same_with_a_cache_and_without_under_every_layout(base, tmp_path):
    """Prompts of equal length share a batch, and end inside a block."""
    common = ["--block-size", "4", "--length", "9", "--no-stop-at-eos", "--temperature", "1"]
    common += ["--prompt", "50 51 52 53 54", "--prompt", "60 61 62 63 64", "--prompt", "3"]
    one = generate(base, tmp_path / "one", *common)
    assert len(one.splitlines()) == 6
    assert one == generate(base, tmp_path / "uncached", *common, "--no-kv-cache")
    assert one == generate(base, tmp_path / "alone", *common, "--batch-size", "1")
    stages = ["--pipeline-model-parallel-size", "2"]
    assert one == generate(base, tmp_path / "stages", *common, *stages, world=2)
    assert one == generate(base, tmp_path / "tensor", *common, world=2)
    assert one != generate(base, tmp_path / "rows", *common[2:])
    # The cache gets a block when its editing ends.
    common += ["--threshold", "0.5", "--edit-threshold", "0", "--edit-steps", "2"]
    edited = generate(base, tmp_path / "edited", *common)
    assert edited != one and [line for line in edited.splitlines() if line.startswith("5")]
    assert edited == generate(base, tmp_path / "edited tensor", *common, "--no-kv-cache", world=2)
    assert edited == generate(base, tmp_path / "edited stages", *common, *stages, world=2)
