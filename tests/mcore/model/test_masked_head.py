"""The head at masked positions gives the same results as the head at all positions."""

import pytest
import torch
from megatron.core import mpu
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_mdm.mcore.model.masked_head import ROW_MULTIPLE, HeadContext, MaskedPositions, head
from megatron_mdm.mcore.training.carried import SamplerState
from tests import ranks
from tests.one_rank import on_one_cpu_rank, output_layer

METHODS = "--mdm-mask exact-count --mdm-views 2 --mdm-rate-sampler ppots --mdm-ppots-bins 4"
METHODS += " --mdm-ppots-refit-interval 1 --mdm-ppots-target gradient --mdm-confidence-loss 0.5"
SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
# name -> number of ranks, flags, whether embeddings are tied to the output layer
RUNS = {
    "1 rank, bernoulli": (1, "", False),
    "TP 2, bernoulli": (2, "--tensor-model-parallel-size 2", False),
    "PP 2 x VP 2, bernoulli": (2, f"{PP} --num-layers-per-virtual-pipeline-stage 1", False),
    "DP 2, methods, tied": (2, METHODS, True),
    "TP 2 + SP, methods, tied": (2, f"{METHODS} {SP}", True),
    "PP 2, methods, tied": (2, f"{METHODS} {PP}", True),
    "HybridModel, TP 2 + SP, methods, tied": (2, f"{METHODS} {SP} --mdm-model hybrid", True),
    "HybridModel, PP 2, bernoulli": (2, f"{PP} --mdm-model hybrid", False),
}
# One step of plain SGD with a learning rate so large that the new weights show the gradient.
STEP = "--optimizer sgd --sgd-momentum 0 --lr 1e4 --weight-decay 0 --clip-grad 0".split()
STEP += "--train-iters 1 --save-interval 1 --eval-iters 2 --seed 7".split()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs with each head from the same initial weights, named by run and head."""
    directory = tmp_path_factory.mktemp("head")
    common = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache"), *STEP]
    found = {}
    for is_tied in (False, True):
        words = {}
        for name, (count, flags, tied) in RUNS.items():
            for kind in ("masked", "full"):
                save = ["--save", str(directory / f"{name}, {kind}" / "checkpoint")]
                if tied == is_tied:
                    own = [*save, "--mdm-head", kind, *flags.split()]
                    words[f"{name}, {kind}"] = count, [*common, *own]
        drop = ["--untie-embeddings-and-output-weights"] if is_tied else []
        found |= ranks.launch_layouts(directory, words, drop=drop)
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradients_are_those_of_the_full_head(runs, name):
    masked, full = (runs[f"{name}, {kind}"] for kind in ("masked", "full"))
    _, flags, tied = RUNS[name]
    assert ("output_layer.weight" in full.weights) != tied
    assert masked.losses == pytest.approx(full.losses, rel=1e-6)
    assert masked.grad_norms == pytest.approx(full.grad_norms, rel=1e-6)
    assert (SamplerState.KEY in full.weights) == ("--mdm-ppots-target" in flags)
    validation = "mdm/validation NELBO"
    assert masked.scalars[validation] == pytest.approx(full.scalars[validation], rel=1e-6)
    assert masked.weights.keys() == full.weights.keys()
    for name, value in full.weights.items():
        ours = masked.weights[name]
        if name == SamplerState.KEY:  # squares of norms, bits of float64
            ours, value = ours.view(torch.float64), value.view(torch.float64)
            torch.testing.assert_close(ours, value, rtol=1e-5, atol=0.0)
        assert (ours - value).norm() <= 1e-6 * value.norm(), name


MASKS = {
    "none": lambda u: u < 0,
    "all": lambda u: u < 1,
    "some": lambda u: u < 0.4,
    "uneven parts": lambda u: (torch.arange(u.shape[1]) < u.shape[1] // 2) & (u < 0.9),
    "one": lambda u: u == u.min(),
}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("length", [4, 64])
@pytest.mark.parametrize("mask", MASKS)
def test_selection_of_positions(mask, length, parts):
    """Compares with a head at all positions in float64. A part is one rank's rows under SP."""
    generator = torch.Generator().manual_seed(0)
    b, h, vocabulary = 3, 8, 11
    hidden = torch.randn(length, b, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, h, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (b, length), generator=generator)
    row_weight = torch.rand(b, 1, generator=generator, dtype=torch.float64)
    chosen = MASKS[mask](torch.rand(b, length, generator=generator))
    cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")

    def everywhere(x, w):
        return cross_entropy((x @ w.t()).permute(1, 2, 0), labels)

    def selected(x, w):
        ranks_of = [MaskedPositions(chosen, parts, part) for part in range(parts)]
        compact = [p.compact(x) for p, x in zip(ranks_of, x.chunk(parts), strict=True)]
        most = max(int(m.sum()) for m in chosen.chunk(parts, dim=1))
        for rows in compact:
            assert rows.shape[0] % ROW_MULTIPLE == 0
            assert ROW_MULTIPLE <= rows.shape[0] < max(most, 1) + ROW_MULTIPLE
        logits = torch.cat(compact) @ w.t()
        values = cross_entropy(logits[:, 0], ranks_of[0].compact_labels(labels)[0])
        return ranks_of[-1].scatter(values[None])

    def results(losses):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = torch.where(chosen, losses(x, w), 0.0)
        return values, *torch.autograd.grad((values * row_weight).sum(), (x, w))

    for ours, reference in zip(results(selected), results(everywhere), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)
    assert not selected(hidden, weight)[~chosen].any()


@pytest.mark.parametrize("mask", MASKS)
def test_the_fused_cross_entropy_gives_the_same(mask):
    """Gradients of --cross-entropy-loss-fusion are bfloat16; so are the others, once rounded."""

    def fused(labels, logits):
        group = mpu.get_tensor_model_parallel_group()
        return fused_vocab_parallel_cross_entropy(logits, labels.t().contiguous(), group).t()

    def plain(labels, logits):
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t().contiguous()

    def unscaled(logits):
        return logits

    generator = torch.Generator().manual_seed(0)
    with on_one_cpu_rank():
        layer = output_layer(96, 16)
        layer.bfloat16()
        states = torch.randn(24, 3, 16, generator=generator).bfloat16().requires_grad_()
        labels = torch.randint(96, (3, 24), generator=generator)
        chosen = MASKS[mask](torch.rand(3, 24, generator=generator))

        def results(cross_entropy):
            context = HeadContext(MaskedPositions(chosen))
            losses = head(states, layer, None, labels, cross_entropy, unscaled, None, context)
            return losses, *torch.autograd.grad(losses.sum(), (states, layer.weight))

        for ours, reference in zip(results(fused), results(plain), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)
