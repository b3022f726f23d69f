"""What a run needs of its tokenizer, and of the flags of the checkpoint that it goes on from."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags import arguments
from megatron_mdm.mcore.flags.resume import plan_resume
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
@pytest.mark.parametrize("eod", [None, -1])  # Hugging Face's and sentencepiece's answers
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
    # As Megatron's validation sets them.
    args.padded_vocab_size, args.ffn_hidden_size, args.kv_channels = 128, 64, 8
    return arguments.finalize_args(args)


def test_a_resumed_run_with_other_flags(base, monkeypatch, tokenizer):
    words = [*base[base.index("--load") : base.index("--finetune")], "--mdm-mask", "exact-count"]
    words += ["--mdm-eps", "0.01", "--seed", "7", "--no-mdm-eod-eligible"]
    with pytest.raises(UserError) as caught:
        finalize_args(parsed(monkeypatch, *words, data=base[:2]))
    message = str(caught.value)
    assert "--mdm-mask exact-count (checkpoint: bernoulli)" in message
    assert "--mdm-eps 0.01 (checkpoint: 0.001)" in message
    assert "--seed 7 (checkpoint: 1234)" in message
    assert "--mdm-eod-eligible False (checkpoint: True)" in message
    assert message.count("(checkpoint: ") == 4
    assert "add --mdm-allow-flag-change" in message

    for words_that_allow in (["--mdm-allow-flag-change"], ["--finetune"]):
        finalize_args(parsed(monkeypatch, *words, *words_that_allow, data=base[:2]))
    finalize_args(parsed(monkeypatch, *words[:2], data=base[:2]))
    with pytest.raises(UserError, match="--mock-data True .checkpoint: False.. Give its values"):
        finalize_args(parsed(monkeypatch, *words[:2]))


def test_a_pretrained_checkpoint_is_a_new_run_of_the_same_model(
    base, monkeypatch, tmp_path, tokenizer
):
    """Until --load has a checkpoint, which then is what the flags are compared with."""
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
    # A first start of a run that can be started again has no checkpoint yet.
    gone = ["--load", str(tmp_path / "gone")]
    resolved(*gone, "--save", gone[1], "--save-interval", "1")
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone)
    with pytest.raises(UserError, match="^--load .*gone has no checkpoint: give the directory"):
        resolved(*gone, "--finetune")


def resuming(**settings):
    """The arguments of a run that resumes."""
    args = Namespace(**MDMConfig(**settings).arguments(), load="somewhere", finetune=False)
    args.mdm_row_order, args.ckpt_format = "epoch", "torch_dist"
    args.use_checkpoint_opt_param_scheduler, args.step_batch_size_schedule = False, None
    args.weight_decay_incr_style, args.skip_train = "constant", False
    args.train_samples, args.train_iters = None, 100
    return args


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
        args = resuming(**before)
        saved = {**vars(args), **plan_resume(args, {}).arguments()}
        for after in runs:
            args = resuming(**after, allow_flag_change=True)
            capsys.readouterr()
            plan = plan_resume(args, saved)
            assert plan.log_state_in_checkpoint == (before == after)
            said = "the controlled loss in the logs starts over" in capsys.readouterr().out
            assert said == (before != after)
    # P-POTS leaves the objective as it is, and these are the settings that older versions kept.
    fitted = resuming(rate_sampler="ppots", ppots_refit_interval=2, allow_flag_change=True)
    assert plan_resume(resuming(), {}).log_state == [10, None]
    assert plan_resume(fitted, {}).log_state == [10, None]


def test_a_run_that_fits_its_density_resumes_without_the_file_it_began_with():
    """Another density is in the checkpoint by then, whatever is in the file, or without one."""
    fitted = {"rate_sampler": "ppots", "ppots_refit_interval": 2}
    for file in ("gone.json", None):
        args = resuming(**fitted, ppots_file=file)
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
