"""One process trains one objective after another, each as if it were alone."""

import copy
import dataclasses

import pytest
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training import global_vars
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_mdm.mcore.training.objective import build_objective
from tests import ranks

ONLINE = [
    *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 2 --mdm-ppots-bins 4".split(),
    *"--mdm-ppots-target gradient --mdm-views 2 --mdm-mask exact-count --train-iters 5".split(),
    *"--eval-iters 1 --eval-interval 2".split(),
]
FINE_TUNING = [
    *"--mdm-sft --mdm-isolate-documents --mdm-rate-per document --mdm-normalization rows".split(),
    *"--train-iters 4 --eval-iters 1".split(),
]


@pytest.fixture(scope="module")
def runs(base, pairs, tmp_path_factory):
    """Three runs in one process, and both objectives in separate processes."""
    directory = tmp_path_factory.mktemp("two-runs")
    online = [*base, *ONLINE]
    tuning = [*base, *FINE_TUNING, "--data-path", str(pairs)]
    together = {"online": online, "fine-tuning": tuning, "online again": online}
    found = ranks.launch_all(directory, 1, together)
    return found | {
        "online alone": ranks.launch(directory / "alone", 1, *online),
        "fine-tuning alone": ranks.launch(directory / "alone-tuning", 1, *tuning),
    }


@pytest.mark.parametrize(
    ("one", "alone"),
    [
        ("online", "online alone"),
        ("fine-tuning", "fine-tuning alone"),  # second run of its process
        ("online again", "online alone"),  # third run of its process
    ],
)
def test_a_run_after_another_is_as_if_it_were_alone(runs, one, alone):
    one, alone = runs[one], runs[alone]
    assert one.masks() == alone.masks() and len(one.masks()) > 16
    timed = {name for name in alone.scalars if "per s" in name or "time" in name}
    assert set(one.scalars) == set(alone.scalars)
    for name in set(alone.scalars) - timed:
        assert one.scalars[name] == alone.scalars[name], name
    assert len(alone.losses) >= 4 and len(set(alone.losses)) == len(alone.losses)


def test_both_objectives_did_what_they_are_named_for(runs):
    assert runs["online again"].output[0].count("P-POTS refit at iteration") == 2
    assert len(set(runs["online again"].scalars["mdm/density at t 0.05"])) == 2
    assert not any("density" in name for name in runs["fine-tuning"].scalars)


def test_nothing_of_a_state_is_copied_or_saved(base):
    """Checkpoints hold the arguments, and Megatron copies its configurations for some layers."""
    load = base[base.index("--load") + 1]
    args = load_common_state_dict(f"{load}/iter_0000020")["args"]
    vars(args).update(mdm_rate_sampler="ppots", mdm_ppots_refit_interval=2)
    before = dict(vars(args))
    global_vars.rebuild_tokenizer(args)
    try:
        objective = build_objective(args)
    finally:
        global_vars.destroy_global_vars()
    assert objective.state.sampler is not None
    assert vars(args) == before
    container = pretrain_cfg_container_from_args(args, objective.model_config)
    copied, config = copy.deepcopy(container).model, container.model
    assert copied.transformer is not config.transformer
    assert copied.transformer.finalize_model_grads_func is objective.after_gradients
    assert (copied.before_model, copied.finish_stage) == (config.before_model, config.finish_stage)
    with pytest.raises(RuntimeError, match="has no hooks of the objective: dataclasses.replace"):
        dataclasses.replace(config).before_model()
    for saved in (config.as_dict(), container.to_dict()):
        assert "finish_stage" not in saved.get("model", saved)
        assert "TrainingState" not in repr(saved)
