"""Context parallelism: rows that are cut over ranks train as whole rows do.

The tests use an attention of their own, because Megatron's local attention refuses cut rows.
"""

import pytest
import torch

from megatron_mdm.mcore.training.carried import SamplerState
from tests import ranks
from tests.mcore.training.test_normalization import ONE_STEP
from tests.ranks.gathering_attention import context_parallel

CP = "--context-parallel-size 2"
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
ONLINE = "--mdm-rate-sampler ppots --mdm-ppots-bins 4 --mdm-ppots-refit-interval 1"
# The first covers MIRROR, exact counts and gradient norms of whole rows. The second covers losses
# of documents with their own rates, a shift, and rows with unequal numbers of eligible tokens.
METHODS = f"--mdm-views 2 --mdm-mask exact-count {ONLINE} --mdm-ppots-target gradient"
SHIFTED = f"--mdm-shift --no-mdm-eod-eligible {ONLINE} --mdm-normalization rows"
SHIFTED += " --mdm-rate-per document"
RUNS = {
    METHODS: {
        "CP 2": (2, CP),
        "CP 2 x TP 2 + SP": (4, f"{CP} {TP}"),
        "CP 2, full": (2, f"{CP} --mdm-head full"),
    },
    SHIFTED: {"CP 2 x DP 2": (4, CP), "CP 2 x PP 2": (4, f"{CP} {PP}")},
}


@pytest.fixture(scope="module", params=RUNS, ids=["methods", "shifted"])
def runs(request, base, tmp_path_factory):
    """One step, so large that it shows the gradient, and an evaluation after it."""

    def run(count, flags, entry):
        directory = tmp_path_factory.mktemp("run")
        save = ["--save", str(directory / "checkpoint"), "--save-interval", "1"]
        steps = [*ONE_STEP, "--train-iters", "1", "--eval-iters", "1", *request.param.split()]
        result = ranks.launch(directory, count, *base, *steps, *save, *flags.split(), entry=entry)
        result.weights = ranks.weights(directory / "checkpoint")
        return result

    layouts = RUNS[request.param]
    whole = run(1, "", ranks.train)
    return whole, {name: run(*layout, context_parallel) for name, layout in layouts.items()}


def test_everything_is_that_of_whole_rows(runs):
    whole, layouts = runs
    for name, run in layouts.items():
        assert run.masks() == whole.masks(), name
        assert run.scalars.keys() == whole.scalars.keys()
        for tag, values in whole.scalars.items():
            if "per s" not in tag and "time" not in tag:
                assert run.scalars[tag] == pytest.approx(values, rel=1e-5), (name, tag)
        assert run.weights.keys() == whole.weights.keys()
        for key, value in whole.weights.items():
            ours = run.weights[key]
            if key == SamplerState.KEY:  # bits of float64; every step ends in a fit
                ours, value = ours.view(torch.float64), value.view(torch.float64)
            assert (ours - value).norm() <= 1e-5 * value.norm(), (name, key)
