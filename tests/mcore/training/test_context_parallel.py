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
METHODS = f"--mdm-views 2 --mdm-mask exact-count {ONLINE} --mdm-ppots-target gradient "
METHODS += "--mdm-confidence-loss 0.5"
SHIFTED = f"--mdm-shift --no-mdm-eod-eligible {ONLINE} --mdm-normalization rows"
SHIFTED += " --mdm-rate-per document"
# Rows of noisy and clean tokens. The first covers MIRROR, a shift, documents and gradient norms.
# The second covers a next-token loss, and documents with their own rates that count as one each.
DIVIDED = "--mdm-block-size 4 --mdm-isolate-documents"
BLOCKS = f"{DIVIDED} --mdm-views 2 --mdm-shift --mdm-mask exact-count {ONLINE} "
BLOCKS += "--mdm-ppots-target gradient"
NEXT_TOKENS = f"{DIVIDED} --mdm-ar-loss-weight 0.3 --mdm-normalization rows --mdm-rate-per document"
RUNS = {
    METHODS: {
        "CP 2": (2, CP),
        "CP 2 x TP 2 + SP": (4, f"{CP} {TP}"),
        "CP 2, full": (2, f"{CP} --mdm-head full"),
    },
    SHIFTED: {"CP 2 x DP 2": (4, CP), "CP 2 x PP 2": (4, f"{CP} {PP}")},
    BLOCKS: {"CP 2": (2, CP), "CP 2 x TP 2 + SP": (4, f"{CP} {TP}")},
    NEXT_TOKENS: {
        "CP 2 x PP 2": (4, f"{CP} {PP}"),
        "HybridModel, CP 2": (2, f"{CP} --mdm-model hybrid"),
    },
}
NAMES = dict(zip(RUNS, ("methods", "shifted", "blocks", "next-token loss"), strict=True))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """One step, so large that it shows the gradient, and an evaluation after it."""
    directory, wholes, cut = tmp_path_factory.mktemp("runs"), {}, {}

    def words(name, method, flags=""):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "1"]
        steps = [*ONE_STEP, "--train-iters", "1", "--eval-iters", "1", *method.split()]
        return [*base, *steps, *save, *flags.split()]

    for method, name in NAMES.items():
        wholes[name] = words(name, method)
        for layout, (count, flags) in RUNS[method].items():
            cut[f"{name}, {layout}"] = count, words(f"{name}, {layout}", method, flags)
    found = ranks.launch_all(directory, 1, wholes)
    found |= ranks.launch_layouts(directory, cut, entry=context_parallel)
    for name, run in found.items():
        run.weights = ranks.weights(directory / name / "checkpoint")
    return found


@pytest.mark.parametrize("method", RUNS, ids=NAMES.values())
def test_everything_is_that_of_whole_rows(runs, method):
    whole = runs[NAMES[method]]
    for name in RUNS[method]:
        run = runs[f"{NAMES[method]}, {name}"]
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
