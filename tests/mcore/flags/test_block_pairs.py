"""Blocks with every other setting: the test that shows it, or the line that refuses it.

The table in objective/README.md is made from these lists. This command writes it:
python -m tests.mcore.flags.test_block_pairs
"""

import re

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from tests import ROOT
from tests.mcore.flags.parsing import FITTED, parsed

GUIDE = ROOT / "megatron_mdm/objective/README.md"
BEGIN, END = "<!-- pairs -->\n", "<!-- end of pairs -->\n"
ENGINE = "--transformer-impl transformer_engine --bf16"
NORMALIZATION = "mcore/training/test_normalization.py"
LAYOUTS = "mcore/training/test_blocks.py"
COUNTS = "objective/test_count_weight.py"
# (what, flags beside --mdm-block-size 4, the file of tests that shows that it works)
WORKS = [
    ("`uniform`, Bernoulli masks", "", NORMALIZATION),
    ("`clipped` rates", "--mdm-rate-sampler clipped --mdm-clip 0.3 0.8", COUNTS),
    ("`flat` rates", "--mdm-rate-sampler flat", COUNTS),
    ("bells", "--mdm-rate-sampler beta --mdm-beta 2 2", COUNTS),
    ("P-POTS from a file", FITTED, COUNTS),
    (
        "online P-POTS on losses",
        "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2",
        LAYOUTS,
    ),
    (
        "online P-POTS on gradients",
        "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-target gradient",
        LAYOUTS,
    ),
    ("lattice and independent quantiles", "--mdm-quantiles iid", LAYOUTS),
    ("StraTS", "--mdm-quantiles strata", LAYOUTS),
    ("exact counts", "--mdm-mask exact-count", LAYOUTS),
    ("MIRROR, K views", "--mdm-views 2", "objective/test_blocks.py"),
    ("ISAD", "--mdm-isad-token-ids 3 --mdm-isad-delta 0.2", NORMALIZATION),
    ("SFT", "--mdm-sft", NORMALIZATION),
    ("SyRM", "--mdm-sft --mdm-syrm-token-ids 3", NORMALIZATION),
    (
        "packed SFT, responses padded to a multiple",
        "--mdm-sft --mdm-isolate-documents --mdm-pad-response-to-multiple-of 4",
        NORMALIZATION,
    ),
    ("documents apart", "--mdm-isolate-documents", LAYOUTS),
    ("rows that end early", "--mdm-random-length-fraction 0.1", NORMALIZATION),
    ("one rate a row", "--mdm-rate-per row", NORMALIZATION),
    ("one rate a document", "--mdm-rate-per document", NORMALIZATION),
    ("normalization by rows", "--mdm-normalization rows", LAYOUTS),
    ("`--mdm-shift`", "--mdm-shift", LAYOUTS),
    ("`--mdm-shift-first noisy`", "--mdm-shift --mdm-shift-first noisy", NORMALIZATION),
    ("`--mdm-ar-loss-weight`", "--mdm-ar-loss-weight 0.5", NORMALIZATION),
    ("`--mdm-confidence-loss`", "--mdm-confidence-loss 0.5", NORMALIZATION),
    ("`--mdm-embedding-noise`", "--mdm-embedding-noise 0.1 9", LAYOUTS),
    ("hidden padding and ends of documents", "--no-mdm-eod-attended", "objective/test_blocks.py"),
    ("the full head", "--mdm-head full", "objective/test_blocks.py"),
    ("evaluations at other sizes", "--mdm-eval-block-sizes 2 row", LAYOUTS),
    (
        "tensor, sequence, pipeline and data parallelism, virtual stages, HybridModel",
        "--mdm-model hybrid",
        LAYOUTS,
    ),
    (
        "full recomputation",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        LAYOUTS,
    ),
    ("experts", "--num-experts 4 --moe-router-topk 2", "mcore/model/test_moe.py"),
    (
        "context parallelism (with the tests' attention)",
        f"{ENGINE} --context-parallel-size 2",
        "mcore/training/test_context_parallel.py",
    ),
    (
        "Transformer Engine's layers (built, not run on a GPU)",
        ENGINE,
        "mcore/model/test_transformer_engine.py",
    ),
    ("`--log-throughput`", "--log-throughput", "mcore/training/test_logs.py"),
]
# (what, flags beside --mdm-block-size 4, the line)
REFUSED = [
    (
        "annealed attention",
        "--mdm-anneal-attention-iters 9",
        "--mdm-anneal-attention-iters does not go with blocks",
    ),
    (
        "P-POTS on gradients with a next-token loss and a shift",
        "--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-target gradient "
        "--mdm-shift --mdm-ar-loss-weight 0.1",
        "use --mdm-ppots-target loss",
    ),
    ("CUDA graphs", "--cuda-graph-impl local", "does not go with --cuda-graph-impl local"),
    ("`--tp-comm-overlap`", "--tp-comm-overlap", "does not go with --tp-comm-overlap"),
    (
        "Transformer Engine in float32",
        "--transformer-impl transformer_engine",
        "needs --bf16 or --fp16",
    ),
    (
        "FlashAttention",
        f"{ENGINE} --attention-backend flash",
        "does not go with --attention-backend flash, which takes no mask",
    ),
    (
        "multi-latent attention",
        f"{ENGINE} --multi-latent-attention",
        "does not go with --multi-latent-attention",
    ),
    (
        "ring attention but p2p",
        f"{ENGINE} --context-parallel-size 2 --cp-comm-type a2a",
        "does not go with --cp-comm-type a2a",
    ),
    (
        "the dispatchers `hybridep` and `ncclep`",
        "--num-experts 2 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep",
        "whose buffers keep the number of positions of the first step: use deepep",
    ),
]


def checked(monkeypatch, flags):
    world = 2 if "--context-parallel-size 2" in flags else 1
    args = parsed(monkeypatch, *"--mdm-block-size 4".split(), *flags.split(), world=world)
    if "transformer_engine" in flags:  # which need not be installed
        arguments.check_flags_of_gpus(args)
    else:
        arguments.validate_flags(args)


@pytest.mark.parametrize(("what", "flags", "proof"), WORKS, ids=[case[0] for case in WORKS])
def test_what_works_is_accepted(what, flags, proof, monkeypatch):
    checked(monkeypatch, flags)
    assert (ROOT / "tests" / proof).is_file()


@pytest.mark.parametrize(("what", "flags", "line"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_does_not_work_is_refused(what, flags, line, monkeypatch):
    with pytest.raises(UserError, match=re.escape(line)):
        checked(monkeypatch, flags)


def table() -> str:
    """The table of the guide."""
    lines = ["| with blocks | |", "|---|---|"]
    lines += [f"| {what} | works: `{proof}` |" for what, _, proof in WORKS]
    lines += [f'| {what} | refused: "{line}" |' for what, _, line in REFUSED]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The guide with the table of today."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def test_the_guide_has_the_table():
    text = GUIDE.read_text()
    assert text == with_table(text), "python -m tests.mcore.flags.test_block_pairs"


if __name__ == "__main__":
    GUIDE.write_text(with_table(GUIDE.read_text()))
