"""Documents of a packed row: what they see, and their own rates under every layout.

test_normalization.py shows that loss and gradients are those of the documents alone.
"""

import itertools
import os
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from torch.nn import functional

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.batch import Batch
from megatron_mdm.mcore.data.documents import isolated_documents, position_ids
from megatron_mdm.mcore.inference import measure as measure_module
from megatron_mdm.mcore.model.attention_mask import (
    attention_mask_argument,
    dense_attention_mask,
    document_cu_seqlens,
)
from megatron_mdm.mcore.model.row_layout import attend_in_documents
from megatron_mdm.mcore.training.micro_batch import MicroBatch
from megatron_mdm.mcore.training.ppots import OnlineSampler
from megatron_mdm.objective.corruption import Corruption
from megatron_mdm.objective.ppots.exact_sums import from_limbs
from megatron_mdm.objective.ppots.moments import accumulate
from tests import ranks
from tests.one_rank import on_one_cpu_rank

EOD = 9
ROW = torch.tensor([[1, 2, EOD, 3, EOD, EOD, 4, 5]])
ISOLATED = MDMConfig(isolate_documents=True)


def test_positions_start_over_and_attention_stays_inside():
    documents = isolated_documents(ROW, EOD, ISOLATED)
    assert position_ids(ROW, documents).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    mask = dense_attention_mask(ROW, torch.zeros_like(ROW).bool(), EOD, ISOLATED, documents)
    inside = torch.block_diag(*(torch.ones(n, n) for n in (3, 2, 1, 2))).bool()
    assert torch.equal(~mask[0, 0], inside)
    hiding = replace(ISOLATED, eod_attended=False)
    mask = dense_attention_mask(ROW, torch.zeros_like(ROW).bool(), EOD, hiding, documents)
    inside[:, ROW[0] == EOD] = False
    inside[5, 5] = True  # the only token of its document
    assert torch.equal(~mask[0, 0], inside)


def test_without_the_flag_a_row_is_one_document():
    assert isolated_documents(ROW, EOD, MDMConfig()) is None
    assert position_ids(ROW, None).tolist() == [list(range(8))]
    assert dense_attention_mask(ROW, torch.zeros_like(ROW).bool(), EOD, MDMConfig(), None) is None


def test_layouts_are_equal(base, tmp_path):
    """Middle stages need the documents too. With --mdm-shift, first tokens are not masked."""
    flags = [*base, "--mdm-isolate-documents", "--mdm-shift", "--train-iters", "2"]
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    one = ranks.launch(tmp_path / "one", 1, *flags)
    two = ranks.launch(tmp_path / "two", 2, *flags, *stages)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    documents = [tokens for (split, _), (_, tokens) in one.masks().items() if split == 0]
    firsts = [row[i + 1] for row in documents for i in range(31) if row[i] == ranks.EOD_ID]
    assert len(firsts) > 5
    assert ranks.MASK_ID not in firsts


OWN_RATES = [
    *"--mdm-isolate-documents --mdm-rate-per document --mdm-views 2 --train-iters 4".split(),
    *"--mdm-recipe ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 4".split(),
    *"--no-mdm-eod-eligible --mdm-random-length-fraction 0.3 --eval-iters 1".split(),
]


@pytest.fixture(scope="module")
def own_rates(base, tmp_path_factory):
    """All at once: own rates, isolation, MIRROR, P-POTS on the gradient, random lengths."""
    directory = tmp_path_factory.mktemp("own_rates")
    split = "--tensor-model-parallel-size 2 --sequence-parallel".split()
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    layouts = {
        "one": (1, ["--micro-batch-size", "4"]),
        "DP 2": (2, []),
        "TP 2 SP": (2, split),
        "PP 2 x VP 2": (2, stages),
    }
    return ranks.launch_layouts(
        directory, {name: (n, [*base, *OWN_RATES, *flags]) for name, (n, flags) in layouts.items()}
    )


@pytest.mark.parametrize("layout", ["DP 2", "TP 2 SP", "PP 2 x VP 2"])
def test_own_rates_are_equal_under_every_layout(own_rates, layout):
    """After two steps the density is fitted to measurements of documents, and then used."""
    one, run = own_rates["one"], own_rates[layout]
    assert "P-POTS refit at iteration 2" in one.output[0]
    assert run.losses == pytest.approx(one.losses, rel=1e-4)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=1e-4)
    assert run.masks().keys() == one.masks().keys()
    for key, (t, tokens) in one.masks().items():
        assert run.masks()[key][0] == pytest.approx(t, rel=1e-6)
        different = [a != b for a, b in zip(tokens, run.masks()[key][1], strict=True)]
        assert sum(different) <= 1  # refits differ by rounding, which can change a count


def test_documents_of_a_row_have_their_own_rates(own_rates):
    training = {
        row: value for (split, row), value in own_rates["one"].masks().items() if split == 0
    }
    validation = [value for (split, _), value in own_rates["one"].masks().items() if split == 1]
    assert len(training) == 32
    assert all(len(set(t)) == 32 for t, _ in training.values())  # a rate for every document
    assert all(isinstance(t, float) for t, _ in validation)
    pairs = [(training[row], training[row + 1]) for row in range(0, 32, 2)]  # two views of a text
    assert all(a[0] == b[0] for a, b in pairs)
    assert sum(a[1] != b[1] for a, b in pairs) > 10  # rows of a few tokens may be masked alike
    # Ends of documents are never masked here. They also fill the positions beyond a row's length.
    ends = [[[x == ranks.EOD_ID for x in row] for _, row in pair] for pair in pairs]
    assert all(a == b for a, b in ends)
    assert sum(all(a[-4:]) for a, _ in ends) >= 2


def test_the_fit_counts_documents(own_rates):
    """Two steps of 8 rows hold more documents than rows, and none of them is skipped."""
    line = next(x for x in own_rates["one"].output[0].splitlines() if "P-POTS refit" in x)
    assert 16 < float(line.split(" of ")[1].split(" rows")[0]) < 16 * 8
    assert ", 0 skipped" in line


def measured_documents() -> None:
    """Measures moments as a fit does, and again from documents that the model sees alone.

    For each target it saves (bins of the documents' draws, sums of the moments, expected sums).
    """
    (load,) = sys.argv[sys.argv.index("--") + 1 :]
    found: dict = {}
    mask_for_bins = measure_module.mask_for_bins

    def recording_mask(tokens, eligible, *draws, **settings):
        result = mask_for_bins(tokens, eligible, *draws, **settings)
        columns = (tokens, eligible, draws[-1], result.tokens, result.mask, result.weight, result.t)
        drawn.extend(zip(*columns, strict=True))
        return result

    measure_module.mask_for_bins = recording_mask
    with open_checkpoint(load, "cpu") as loaded:
        loaded.args.mdm_isolate_documents, loaded.args.mdm_rate_per = True, "document"
        head = unwrap_model(loaded.model).output_layer.weight.detach().double()
        for target in ("loss", "gradient"):
            drawn: list = []
            *_, (_, _, measured) = measure_module.measure(
                loaded, target, num_bins=4, num_rows=6, masks_per_bin=2
            )
            bins, expected = [], np.zeros(17)
            for draw, (tokens, eligible, documents, seen, mask, weight, t) in enumerate(drawn):
                for number in documents.unique().tolist():
                    own = documents == number
                    able = int(eligible[own].sum())
                    if not able:
                        continue
                    logits = loaded.logits(seen[own][None])[0].double()
                    error = logits.softmax(-1) - functional.one_hot(tokens[own], logits.shape[-1])
                    loss = functional.cross_entropy(logits, tokens[own], reduction="none")
                    # This checkpoint was trained under `tokens`, which divides by the row's length.
                    share = (mask * weight)[own] / tokens.numel()
                    value = (share * loss).sum()
                    if target == "gradient":
                        value = (share[:, None] * error @ head).norm()
                    bins.append((draw // 8, number, int(t[number] * 4)))
                    expected += from_limbs(accumulate(t[number], value, torch.ones(1), 4))
            found[target] = bins, measured.total.vector(), expected
    torch.save(found, f"{os.environ['TRACE_DIR']}/measured.pt")


def test_a_fit_to_a_checkpoint_is_of_its_documents(base, tmp_path):
    """Each document's rates go through all bins, and its values are those of the document alone."""
    load = base[base.index("--load") + 1]
    ranks.launch(tmp_path, 1, "--", load, entry=measured_documents)
    for bins, moments, expected in torch.load(
        tmp_path / "measured.pt", weights_only=False
    ).values():
        documents = {(row, number) for row, number, _ in bins}
        assert len(documents) > 6 and set(Counter(bins).values()) == {2}
        assert len(bins) == 8 * len(documents)
        assert len({number for row, document, number in bins[:5]}) > 1  # bins differ in a row
        torch.testing.assert_close(
            torch.as_tensor(moments), torch.as_tensor(expected), rtol=1e-4, atol=1e-9
        )


def batch_of_documents(config, tokens, num_tokens=8, length=8, maskable=None):
    """A batch as the forward step builds it."""
    b, s = tokens.shape
    zeros = torch.zeros(b, dtype=torch.int64)
    numbers = {"num_tokens": num_tokens, "length": length}
    numbers = {name: torch.full((b,), value) for name, value in numbers.items()}
    uniforms = torch.zeros((b, s), dtype=torch.int64)
    columns = {"tokens": tokens, "uniforms": uniforms, "maskable": maskable, **numbers}
    return Batch(config, EOD, training=True, split=zeros, row=zeros, quantile=zeros, **columns)


def test_what_follows_a_row_that_ends_early_is_a_document_of_nobody():
    short = MDMConfig(random_length_fraction=0.5)
    batch = batch_of_documents(short, ROW, num_tokens=5, length=5)
    assert batch.attention_segments.tolist() == [[0] * 5 + [1] * 3]
    assert batch.eligible.tolist() == [[True] * 5 + [False] * 3]
    # Eligible padding ends at the row's length.
    eligible = MDMConfig(random_length_fraction=0.5, pad_eligible=True)
    batch = batch_of_documents(eligible, ROW, num_tokens=3, length=5)
    assert batch.eligible.tolist() == [[True] * 5 + [False] * 3]
    both = MDMConfig(random_length_fraction=0.5, isolate_documents=True)
    batch = batch_of_documents(both, ROW, num_tokens=4, length=4)
    assert batch.attention_segments.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rate_per": "token"}, "--mdm-rate-per must be one of row, document"),
        ({"random_length_fraction": 1.5}, "--mdm-random-length-fraction must lie in"),
        ({"random_length_fraction": 0.1, "sft": True}, "does not go with --mdm-sft"),
        ({"rate_per": "document", "sft": True}, "needs --mdm-isolate-documents"),
        (
            {"isolate_documents": True, "sft": True, "pad_eligible": True},
            "--mdm-pad-eligible does not go with",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        MDMConfig(**settings)


def test_bounds_of_documents_say_what_the_mask_says():
    """Attention between bounds, as Transformer Engine computes it, equals masked attention."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat(
        [ROW, torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [EOD, 1, 2, EOD, 3, 4, 5, EOD]])]
    )
    documents = isolated_documents(rows, EOD, ISOLATED)
    bounds = document_cu_seqlens(documents)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 5, 6, 8, 16, 17, 20, 24]
    nothing = torch.zeros_like(rows).bool()

    def argument(rows, documents, implementation="transformer_engine"):
        padding = nothing[: len(rows)]
        return attention_mask_argument(rows, padding, EOD, ISOLATED, documents, implementation)

    assert torch.equal(argument(rows, documents), bounds)
    whole = rows[[1, 1]], documents[[1, 1]]  # rows of one document each use ordinary kernels
    assert argument(*whole) is None and argument(rows, None) is None
    assert argument(rows[:2], documents[:2]).tolist() == [0, 3, 5, 6, 8, 16]
    query, key, value, weight = (
        torch.randn(8, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def attention(q, k, v, seen=None):
        """Shapes are [b, heads, s, head size]."""
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)

    def in_parts(q, k, v):
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        cut = [[x[part].transpose(0, 1)[None] for x in (q, k, v)] for part in parts]
        return torch.cat([attention(*part)[0].transpose(0, 1) for part in cut]).flatten(1)

    packed = attend_in_documents(in_parts, *inputs)
    mask = argument(rows, documents, "local")
    masked = attention(*(x.permute(1, 2, 0, 3) for x in inputs), ~mask)
    masked = masked.permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad((x * weight.flatten(2)).sum(), inputs) for x in (packed, masked)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.fixture
def one_rank():
    """Megatron's process groups, of this process alone."""
    with on_one_cpu_rank():
        yield


@pytest.mark.parametrize("per", ["row", "document"])
@pytest.mark.parametrize("normalization", ["tokens", "rows"])
def test_ppots_measures_a_document_as_it_would_be_alone(normalization, per, one_rank):
    """Compares with moments computed in plain torch from squared gradients at positions."""
    mdm = MDMConfig(
        rate_per=per,
        normalization=normalization,
        rate_sampler="ppots",
        ppots_refit_interval=1,
        ppots_bins=4,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([ROW, torch.arange(1, 9)[None]])
    maskable = torch.ones_like(tokens)
    maskable[0, 5] = 0  # document 2 of the first row has nothing to measure
    batch = batch_of_documents(mdm, tokens, maskable=maskable)
    squares = torch.rand(2, 8, generator=generator)
    if per == "document":
        t, q = torch.rand(2, 2, 8, generator=generator, dtype=torch.float64)
        parts = [((0, 0), (0, 3)), ((0, 1), (3, 5)), ((0, 3), (6, 8)), ((1, 0), (0, 8))]
    else:
        squares[0, 5] = 0.0
        t, q = torch.rand(2, 2, generator=generator, dtype=torch.float64)
        parts = [((0,), (0, 8)), ((1,), (0, 8))]
    corruption = Corruption(torch.zeros(2, 8), batch.eligible, torch.ones(2, 1), t, 1 / q, 1 / q)
    sampler = OnlineSampler(mdm, seq_length=8)
    sampler.record_gradients(MicroBatch(batch, corruption), squares)
    expected = 0
    for draw, part in parts:
        norm = squares[draw[0], slice(*part)].sum().sqrt() * q[draw]
        # Under `tokens` the sum holds L_e l of each document, so its gradient is not divided by
        # L_e.
        value = norm / 8 if normalization == "tokens" else norm
        expected = expected + accumulate(t[draw][None], value[None], 1 / q[draw][None], num_bins=4)
    np.testing.assert_allclose(from_limbs(sampler.pending), from_limbs(expected), rtol=1e-6)
