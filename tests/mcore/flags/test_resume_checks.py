"""What a run needs of its tokenizer, and which flags must equal those of its checkpoint."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.mcore.flags.resume import last_block_size, plan_resume
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.recipes import settings_of
from tests.mcore.flags.parsing import parsed


@pytest.mark.parametrize(
    "flags",
    [
        "--mdm-isolate-documents",
        "--mdm-rate-per document",
        "--no-mdm-eod-eligible",
        "--no-mdm-eod-attended",
        "--mdm-sft",
    ],
)
@pytest.mark.parametrize("eod", [None, -1])  # as Hugging Face and sentencepiece say "none"
def test_flags_that_need_an_end_of_document(flags, eod, monkeypatch):
    monkeypatch.setattr(arguments, "get_tokenizer", lambda: SimpleNamespace(eod=eod))
    with pytest.raises(UserError, match=f"^{flags} needs an end-of-document token, and the token"):
        arguments._check_end_of_document(parsed(monkeypatch, *flags.split()))
    arguments._check_end_of_document(parsed(monkeypatch))


def mask_args(**values):
    return SimpleNamespace(
        mdm_mask_token_id=None, tokenizer_model="some.model", padded_vocab_size=128, **values
    )


def test_a_tokenizer_without_mask_piece(monkeypatch):
    pieces = SimpleNamespace(piece_to_id=lambda piece: 0, unk_id=lambda: 0)
    monkeypatch.setattr(arguments, "get_tokenizer", lambda: SimpleNamespace(tokenizer=pieces))
    with pytest.raises(UserError, match="some.model has no mask piece: give --mdm-mask-token-id"):
        arguments._mask_token_id(mask_args())


def test_a_mask_inside_the_padding_of_the_vocabulary():
    args = mask_args()
    args.mdm_mask_token_id = 127
    assert arguments._mask_token_id(args) == 127
    args.mdm_mask_token_id = 128
    with pytest.raises(UserError, match="--mdm-mask-token-id 128 lies outside the .* of 128"):
        arguments._mask_token_id(args)


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(
        arguments, "get_tokenizer", lambda: SimpleNamespace(eod=126, vocab_size=120)
    )


def finalize_args(args):
    # Megatron's validation sets these.
    args.padded_vocab_size, args.ffn_hidden_size, args.kv_channels = 128, 64, 8
    return arguments.finalize_args(args)


def test_a_resumed_run_with_other_flags(base, monkeypatch, tokenizer):
    words = [*base[base.index("--load") : base.index("--finetune")], "--mdm-mask", "exact-count"]
    words += ["--mdm-eps", "0.01", "--seed", "7", "--no-mdm-eod-eligible", "--mdm-shift"]
    with pytest.raises(UserError) as caught:
        finalize_args(parsed(monkeypatch, *words, data=base[:2]))
    message = str(caught.value)
    assert "--mdm-mask exact-count (checkpoint: bernoulli)" in message
    assert "--mdm-eps 0.01 (checkpoint: 0.001)" in message
    assert "--seed 7 (checkpoint: 1234)" in message
    assert "--mdm-eod-eligible False (checkpoint: True)" in message
    assert "--mdm-shift True (checkpoint: False)" in message
    assert message.count("(checkpoint: ") == 5
    assert "add --mdm-allow-flag-change" in message

    for words_that_allow in (["--mdm-allow-flag-change"], ["--finetune"]):
        finalize_args(parsed(monkeypatch, *words, *words_that_allow, data=base[:2]))
    finalize_args(parsed(monkeypatch, *words[:2], data=base[:2]))
    with pytest.raises(UserError, match="--mock-data True .checkpoint: False.. Give its values"):
        finalize_args(parsed(monkeypatch, *words[:2]))


def test_sizes_of_blocks_may_change_only_where_the_schedule_has_not_begun(
    base, monkeypatch, tokenizer
):
    """The checkpoint has 20 iterations of whole rows, all of them from one process.

    A whole row is one block, so that a rate for each row was one for each block.
    """
    load = base[base.index("--load") : base.index("--finetune")]

    def resume(schedule):
        words = [*load, "--mdm-block-size-schedule", schedule]
        return finalize_args(parsed(monkeypatch, *words, data=base[:2]))

    resume("0:row 20:4")
    message = r"other settings: --mdm-block-size-schedule 0:row 19:4 \(checkpoint: None\)\. Give"
    with pytest.raises(UserError, match=message):
        resume("0:row 19:4")


@pytest.mark.parametrize(
    "batch, finished, size",
    [
        (None, 0, 4),
        (None, 104, 4),  # the last step began after 96 samples
        (None, 112, 8),
        # Steps of 4 rows until sample 96, and of 8 from there.
        ("0:4 3072:8", 100, 4),
        ("0:4 3072:8", 104, 4),
        ("0:4 3072:8", 112, 8),
    ],
)
def test_the_last_step_has_the_size_that_it_began_with(batch, finished, size):
    mdm = MDMConfig(block_size_schedule="0:4 100:8")
    args = resumed(mdm, train_iters=None, train_samples=1000, seq_length=32)
    args.step_batch_size_schedule, args.consumed_train_samples = batch, finished
    assert last_block_size(args, 13) == size
    state = object.__new__(TrainingState)
    state.mdm, state._args = mdm, args
    assert state.block_size(training=False) == size


def test_a_run_of_whole_rows_goes_on_in_blocks_with_its_measurements():
    fitting = {"rate_sampler": "ppots", "ppots_refit_interval": 2}
    rows = resumed(MDMConfig(**fitting, rate_per="row"), iteration=20)
    saved = {**vars(rows), **plan_resume(rows, {}).arguments()}
    blocks = {**fitting, "rate_per": "block", "block_size_schedule": "0:row 20:4"}
    args = resumed(MDMConfig(**blocks))
    assert plan_resume(args, saved).sampler_state_in_checkpoint
    message = "other settings: --mdm-rate-per block .checkpoint: row.; --mdm-isolate-documents"
    with pytest.raises(UserError, match=message):
        plan_resume(resumed(MDMConfig(**blocks, isolate_documents=True)), saved)
    # From then on they are different.
    saved |= {**vars(args), "iteration": 21}
    rows = MDMConfig(**{**blocks, "rate_per": "row"})
    with pytest.raises(UserError, match="--mdm-rate-per row .checkpoint: block"):
        plan_resume(resumed(rows), saved)


def test_a_pretrained_checkpoint_is_a_new_run_of_the_same_model(
    base, monkeypatch, tmp_path, tokenizer
):
    """As soon as --load has a checkpoint, flags are compared with that checkpoint instead."""
    pretrained = base[base.index("--load") + 1]
    new = ["--pretrained-checkpoint", pretrained, "--load", str(tmp_path / "new")]

    def resolved(*words):
        return finalize_args(parsed(monkeypatch, *words, data=base[:2]))

    words = [*new, "--mdm-mask", "exact-count"]
    assert resolved(*words).finetune
    with pytest.raises(UserError) as caught:
        resolved(*words, "--rotary-base", "5000")
    assert str(caught.value).startswith(
        f"the checkpoint in {pretrained} is of another model: --rotary-base is 10000"
    )

    words = ["--pretrained-checkpoint", str(tmp_path / "gone"), "--load"]
    assert not resolved(*words, pretrained).finetune
    with pytest.raises(UserError, match="trained with other settings: --mdm-mask exact-count"):
        resolved(*words, pretrained, "--mdm-mask", "exact-count")
    with pytest.raises(UserError, match="^--pretrained-checkpoint .*gone has no checkpoint: give"):
        resolved(*words, str(tmp_path / "new"))
    # The first start of a run that can be restarted has no checkpoint yet.
    gone = ["--load", str(tmp_path / "gone")]
    resolved(*gone, "--save", gone[1], "--save-interval", "1")
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone)
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone, "--finetune")


def resumed(config, **values):
    """Arguments of a run that resumes from torch_dist checkpoints."""
    given = {
        "load": "somewhere",
        "finetune": False,
        "ckpt_format": "torch_dist",
        "use_checkpoint_opt_param_scheduler": False,
        "global_batch_size": 8,
        "step_batch_size_schedule": None,
        "weight_decay_incr_style": "constant",
        "skip_train": False,
        "mock_data": False,
        "train_iters": 1000,
        "train_samples": None,
    }
    order = {"mdm_row_order": config.row_order or "epoch"}
    return Namespace(**{**config.arguments(), **order, **given, **values})


def test_a_fade_is_resolved_once(capsys):
    """Fractions become counts in the run's unit. A longer run keeps them; a new run does not."""
    bell = {"rate_sampler": "logit-normal", "logit_normal": [0.0, 0.5]}
    fades = MDMConfig(**bell, bell_fade=[0.4, 0.7])
    first = resumed(fades, load=None)
    saved = {**vars(first), **plan_resume(first, {}).arguments()}
    assert saved["mdm_bell_fade_at"] == [400, 700, "iters"]
    assert "fades between 400 and 700 iterations of the run" in capsys.readouterr().out
    # A longer run, and one that counts in samples from now on, keeps the fade as it was.
    for length in ({"train_iters": 3000}, {"train_iters": None, "train_samples": 5000}):
        plan = plan_resume(resumed(fades, **length), saved)
        assert plan.bell_fade_at == [400, 700, "iters"]
        assert "fades between 400 and 700 iterations of the run" in capsys.readouterr().out
    samples = {"train_iters": None, "train_samples": 5000}
    plan = plan_resume(resumed(fades, finetune=True, **samples), saved)
    assert plan.bell_fade_at == [2000, 3500, "samples"]
    # Other fractions are another objective. If they are allowed, they refer to the run's new
    # length.
    other = MDMConfig(**bell, bell_fade=[0.5, 0.5])
    refused = r"--mdm-bell-fade \[0.5, 0.5\] \(checkpoint: \[0.4, 0.7\]\)"
    with pytest.raises(UserError, match=refused):
        plan_resume(resumed(other), saved)
    allowed = {"mdm_allow_flag_change": True, "train_iters": 3000}
    capsys.readouterr()
    assert plan_resume(resumed(other, **allowed), saved).bell_fade_at == [1500, 1500, "iters"]
    told = capsys.readouterr().out
    assert "the run resumes with another --mdm-bell-fade [0.5, 0.5]" in told
    assert "fades between 1500 and 1500 iterations of the run" in told
    # P-POTS begins at the end of a fade, so under another fade it begins again.
    fitting = {"ppots_refit_interval": 50}
    saved |= MDMConfig(**bell, bell_fade=[0.4, 0.7], **fitting).arguments()
    for fade, goes_on in ([0.4, 0.7], True), ([0.5, 0.5], False):
        args = resumed(MDMConfig(**bell, bell_fade=fade, **fitting), **allowed)
        assert plan_resume(args, saved).sampler_state_in_checkpoint == goes_on
        anew = "P-POTS begins to measure anew" in capsys.readouterr().out
        assert anew != goes_on
    # A checkpoint without a fade, and a checkpoint that is older than bells.
    plain = {**vars(resumed(MDMConfig(**bell))), "mdm_bell_fade_at": None}
    with pytest.raises(UserError, match=r"--mdm-bell-fade \[0.4, 0.7\] \(checkpoint: None\)"):
        plan_resume(resumed(fades), plain)
    assert plan_resume(resumed(MDMConfig(**bell)), plain).bell_fade_at is None
    old = {k: v for k, v in vars(resumed(MDMConfig())).items() if "bell" not in k}
    with pytest.raises(UserError, match=r"--mdm-rate-sampler logit-normal \(checkpoint: uniform"):
        plan_resume(resumed(fades), old)


@pytest.mark.parametrize(
    "length, rows",
    [
        ({"train_iters": 1000}, None),
        ({"train_iters": 500, "global_batch_size": 16}, None),
        ({"train_iters": 1000, "train_samples": 8000}, None),
        ({"train_iters": 1001}, 8008),
        ({"global_batch_size": 16}, 16000),
        ({"train_samples": 7999}, 7999),
    ],
)
def test_megatrons_order_of_rows_follows_from_the_length_of_the_run(length, rows, capsys):
    run, epoch = (MDMConfig(row_order=order) for order in ("run", "epoch"))
    saved = vars(resumed(run))
    plan_resume(resumed(run, **length), saved)
    told = f"the run has {rows} rows (checkpoint: 8000), and --mdm-row-order run shuffles all"
    assert (told in capsys.readouterr().out) == (rows is not None)
    plan_resume(resumed(run, **length, skip_train=True), saved)
    plan_resume(resumed(epoch, **length), vars(resumed(epoch)))
    assert "--mdm-row-order" not in capsys.readouterr().out


def test_the_recipe_that_fades_leaves_the_last_step_of_a_short_run():
    for iterations, fade in ((1, [0, 0]), (2, [1, 1]), (4, [3, 3]), (10, [7, 9])):
        config = MDMConfig(**settings_of("recommended"))
        plan = plan_resume(resumed(config, load=None, train_iters=iterations), {})
        assert plan.bell_fade_at == [*fade, "iters"]
    config = MDMConfig(**settings_of("recommended"), recipe="recommended")
    saved = {**vars(resumed(config)), "mdm_bell_fade_at": [700, 900, "iters"]}
    with pytest.raises(UserError, match="--mdm-bell-fade 0.7 0.9 of --mdm-recipe recommended: the"):
        plan_resume(resumed(config, train_iters=900), saved)


def test_a_resume_names_the_recipe_whose_settings_the_checkpoint_has():
    """The meaning of `recommended` has changed."""
    was = MDMConfig(**settings_of("ppots"), recipe="recommended")
    saved = {**vars(resumed(was)), "mdm_bell_fade_at": None}
    now = MDMConfig(**settings_of("recommended"), recipe="recommended")
    with pytest.raises(UserError, match=r"Give its values \(--mdm-recipe ppots\), or add"):
        plan_resume(resumed(now), saved)
    more = {**saved, "mdm_ppots_refit_interval": 500}
    with pytest.raises(UserError, match=r"\(--mdm-recipe ppots and flags by hand\), or add"):
        plan_resume(resumed(now), more)
    # No recipe, or one whose settings do not differ.
    without, same = (MDMConfig(**settings_of("ppots"), recipe=x) for x in (None, "ppots"))
    for config in (without, same):
        plan_resume(resumed(config), saved)
        with pytest.raises(UserError, match="--mdm-views 1.* Give its values, or add"):
            plan_resume(resumed(config), {**saved, "mdm_views": 2, "consumed_train_samples": 0})


@pytest.mark.parametrize(
    "length, last",
    [
        ({"train_iters": 1000}, 999),
        ({"train_samples": 1005, "global_batch_size": 10}, 990),
        # Steps of 4 rows end at 4, 8 and 12, and steps of 8 rows at 20 and so on, the last at 1004.
        ({"train_samples": 1000, "step_batch_size_schedule": "0:4 384:8"}, 996),
    ],
)
def test_a_fade_ends_before_the_last_step_begins(length, last):
    """The last step then trains on the bound."""
    size = {"train_iters": None, "train_samples": None, "seq_length": 32} | length
    unit = next(name for name in ("train_iters", "train_samples") if size[name])
    bell = {"rate_sampler": "logit-normal", "logit_normal": [0.0, 0.5]}

    def fade_at(end, **values):
        fraction = end / size[unit]
        run = resumed(MDMConfig(**bell, bell_fade=[0.5, fraction]), **size | values)
        return run, plan_resume(run, values.get("saved", {})).bell_fade_at

    args, fade = fade_at(last, load=None)
    assert fade[1] == last
    if last + 1 < size[unit]:  # END below 1 leaves the last step
        assert fade_at(last + 1, load=None)[1][1] == last
        assert fade_at(last + 1, load=None, skip_train=True)[1][1] == last + 1
    # A run that resumes keeps its fade, and may have become too short for it.
    saved = {**vars(args), "mdm_bell_fade_at": fade}
    shorter = {unit: size[unit] - 10}
    with pytest.raises(UserError, match=f"the fade ends after {last} .* Give a longer run, or"):
        plan_resume(Namespace(**{**vars(args), **shorter, "load": "somewhere"}), saved)


def test_the_controlled_loss_starts_over_where_the_objective_has_another_density(capsys):
    bell = {"rate_sampler": "logit-normal", "logit_normal": [0.0, 0.5], "bell_fade": [0.4, 0.7]}
    runs = [
        {},
        {"rate_sampler": "clipped", "clip": [0.3, 0.8]},
        {"rate_sampler": "flat"},
        bell,
        {**bell, "bell_fade": None},
        {**bell, "bell_fade": [0.4, 0.8]},
        {**bell, "logit_normal": [0.0, 0.6]},
        {**bell, "bell_uniform_share": 0.2},
        {**bell, "bell_fade": None, "bell_role": "weight"},
        {"rate_sampler": "beta", "beta": [2.0, 2.0]},
    ]
    for before in runs:
        args = resumed(MDMConfig(**before))
        saved = {**vars(args), **plan_resume(args, {}).arguments()}
        for after in runs:
            args = resumed(MDMConfig(**after, allow_flag_change=True))
            capsys.readouterr()
            plan = plan_resume(args, saved)
            assert plan.log_state_in_checkpoint == (before == after)
            said = "the controlled loss in the logs starts over" in capsys.readouterr().out
            assert said == (before != after)
    # P-POTS does not change the objective; these are the settings that older versions saved.
    fitted = MDMConfig(rate_sampler="ppots", ppots_refit_interval=2, allow_flag_change=True)
    assert plan_resume(resumed(MDMConfig()), {}).log_state == [10, None]
    assert plan_resume(resumed(fitted), {}).log_state == [10, None]


def test_a_run_that_fits_its_density_resumes_without_the_file_it_began_with():
    """By then the checkpoint has a density of its own, and the file may be gone or not given."""
    fitted = {"rate_sampler": "ppots", "ppots_refit_interval": 2}
    for file in ("gone.json", None):
        config = MDMConfig(**fitted, ppots_file=file)
        args = resumed(config)
        saved = {
            **vars(args),
            "mdm_ppots_file": "gone.json",
            "mdm_ppots_digest": "0123456789abcdef",
        }
        before = dict(vars(args))
        plan = plan_resume(args, saved)
        assert plan.sampler_state_in_checkpoint and plan.ppots_file is None
        assert vars(args) == before
    with pytest.raises(UserError, match=r"file None \(checkpoint: the density that gone.json held"):
        plan_resume(args, {**saved, "mdm_ppots_refit_interval": 0})
