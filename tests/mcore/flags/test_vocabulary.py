"""The vocabulary's padding takes no part in the softmax, and its ids are not tokens."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_mdm.errors import UserError
from megatron_mdm.mcore.flags.vocabulary import vocabulary_size
from megatron_mdm.mcore.tokenizer import tokenizer_rows
from tests import ranks
from tests.ranks import entries

# 121 tokens; the last one is the mask token.
MASK = ["--vocab-size", "121", "--mdm-mask-token-id", "120"]


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Flags that resume a run after two iterations; its vocabulary is padded to 128 rows."""
    directory = tmp_path_factory.mktemp("start")
    flags = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache"), *MASK]
    # With its usual epsilon, Adam turns the rounding of a vanishing gradient into a step.
    flags += ["--eval-interval", "5", "--eval-iters", "2", "--adam-eps", "1e-2"]
    save = ["--save", str(directory / "checkpoint"), "--save-interval", "2"]
    ranks.launch(directory / "run", 1, *flags, *save, "--exit-interval", "2")
    return [*flags, "--load", str(directory / "checkpoint")]


@pytest.fixture(scope="module")
def without_padding(start, tmp_path_factory):
    """The resumed run with 121 rows and no padding."""
    flags = ["--make-vocab-size-divisible-by", "1"]
    return ranks.launch(tmp_path_factory.mktemp("whole"), 1, *start, *flags)


@pytest.mark.parametrize(
    "count, flags, padded",
    [
        (1, "", 128),
        (2, "--tensor-model-parallel-size 2", 128),
        # The last two ranks hold only padding.
        (4, "--tensor-model-parallel-size 4 --sequence-parallel", 256),
        (1, "--make-vocab-size-divisible-by 300 --mdm-head full", 300),
        (2, "--pipeline-model-parallel-size 2", 128),
    ],
)
def test_one_checkpoint_has_one_loss_whatever_the_padding(
    count, flags, padded, start, without_padding, tmp_path
):
    run = ranks.launch(tmp_path, count, *start, *flags.split())
    assert f"(new size: {padded})" in run.output[0]
    assert_equal(run, without_padding)


def test_the_fused_cross_entropy_leaves_the_padding_out(start, tmp_path):
    """The fused loss rounds gradients to bfloat16, so both runs use it."""
    fused = ["--cross-entropy-loss-fusion"]
    without = ["--make-vocab-size-divisible-by", "1"]
    one, other = (
        ranks.launch(tmp_path / str(len(flags)), 1, *start, *fused, *flags)
        for flags in ([], without)
    )
    assert_equal(one, other)


def assert_equal(run, other):
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(other.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(other.grad_norms, rel=1e-4)
    for name in ("mdm loss validation", "mdm/validation NELBO"):
        assert run.scalars[name] == pytest.approx(other.scalars[name], rel=1e-5)


def test_the_number_of_tokens_is_in_the_checkpoint(start):
    saved = load_common_state_dict(f"{start[-1]}/iter_0000002")["args"]
    assert (saved.mdm_vocab_size, saved.padded_vocab_size) == (121, 128)


def test_tools_leave_the_padding_out(start, tmp_path):
    ranks.launch(tmp_path, 2, "--", start[-1], "1", entry=entries.logits)
    plain, _ = torch.load(tmp_path / "logits0.pt")
    assert all((x[..., 121:].softmax(-1).sum() > 0) for x in plain)  # they are finite
    assert all((x.softmax(-1)[..., 121:] == 0).all() for x in plain)


# -- what is refused


def tokenizer(size):
    return SimpleNamespace(vocab_size=size)


def resolved(size, saved, mask=0, given=None, padded=128, model="my.model", finetune=False):
    args = SimpleNamespace(
        load="run",
        finetune=finetune,
        mdm_mask_token_id=mask,
        mdm_vocab_size=given,
        padded_vocab_size=padded,
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=model,
        rank=1,
    )
    return vocabulary_size(args, tokenizer(size), saved, "run")


def test_a_new_run_counts_the_tokens_of_its_tokenizer():
    assert resolved(100, {}) == 100
    assert resolved(100, {}, mask=110) == 111
    assert resolved(100, {}, given=120) == 120
    with pytest.raises(UserError, match="--mdm-vocab-size 90: the tokenizer and the mask token ha"):
        resolved(100, {}, given=90)
    with pytest.raises(UserError, match="the vocabulary has 130 tokens, and --padded-vocab-size i"):
        resolved(100, {}, given=130)


def test_ids_of_tokenizers_with_holes_are_counted():
    inner = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 119})
    assert tokenizer_rows(SimpleNamespace(vocab_size=2, tokenizer=inner)) == 120


def test_a_converted_model_keeps_rows_beyond_its_tokenizer():
    saved = {"mdm_vocab_size": 128, "padded_vocab_size": 128, "mdm_tokenizer": {"size": 100}}
    assert resolved(100, saved) == 128
    with pytest.raises(UserError, match="--mdm-vocab-size 120: the checkpoint in run has 128 toke"):
        resolved(100, saved, given=120)
    with pytest.raises(UserError, match="has 128 tokens, and --padded-vocab-size is 127: give at"):
        resolved(100, saved, padded=127)


def test_a_tokenizer_that_is_too_large_for_the_checkpoint():
    saved = {"mdm_vocab_size": 100, "padded_vocab_size": 128, "mdm_tokenizer": {"size": 100}}
    with pytest.raises(UserError, match="ids up to 100, and the checkpoint in run has a vocabula"):
        resolved(101, saved)


def test_a_new_run_may_make_tokens_of_the_padding_of_its_checkpoint(start, tmp_path):
    """Such tokens are, for example, markers of a conversation that a pretrained model lacks."""
    saved = {"mdm_vocab_size": 100, "padded_vocab_size": 128, "mdm_tokenizer": {"size": 100}}
    assert resolved(102, saved, given=102, finetune=True) == 102
    with pytest.raises(UserError, match="trained with, or --mdm-vocab-size 102 for new tokens"):
        resolved(102, saved, finetune=True)
    with pytest.raises(UserError, match="has 100 tokens; leave the flag out"):
        resolved(100, saved, given=90, finetune=True)
    with pytest.raises(UserError, match="the vocabulary has 129 tokens, and --padded-vocab-size"):
        resolved(102, saved, given=129, finetune=True)
    flags = ["--finetune", "--mdm-vocab-size", "124", "--exit-interval", "1"]
    run = ranks.launch(tmp_path, 1, *start, *flags)
    assert "the rows of the other 3 (--mdm-vocab-size 124) have not been trained" in run.output[0]
    assert len(run.losses) == 1


def test_a_checkpoint_of_be7fed4_under_another_tokenizer():
    """It has no fingerprint of its tokenizer, but 320 tokens do not have 2048 rows."""
    saved = {"mdm_vocab_size": 2048, "padded_vocab_size": 2048, "tokenizer_model": "their.model"}
    saved |= {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
    saved["tokenizer_type"] = "SentencePieceTokenizer"
    with pytest.raises(UserError, match="vocabulary of 2048 rows, and the tokenizer my.model has"):
        resolved(320, saved, padded=2048)
    assert resolved(320, saved, padded=2048, given=2048) == 2048  # the user says that it fits
    assert resolved(320, saved, padded=2048, model="their.model") == 2048
    assert resolved(2000, saved, padded=2048) == 2048


@pytest.mark.parametrize("blend", [False, True])
def test_tokens_beyond_the_vocabulary_are_named_by_file_and_row(blend, tmp_path, data):
    documents = [[5] * 32 for _ in range(40)]
    for document in documents[20:]:
        document[9] = 125  # an id of the padding
    ranks.write_documents(tmp_path / "text", documents)
    path = str(tmp_path / "text")
    flags = ["--data-path", *(["0.5", path, "0.5", str(data)] if blend else [path]), *MASK]
    run = ranks.launch(tmp_path / "run", 1, *flags, "--split", "100,0,0", check=False)
    (line,) = [x for x in run.output[0].splitlines() if x.startswith("error: ")]
    assert f"of the train data contains the token 125 at position 9 ({path}), and the" in line
    assert "the vocabulary has 121 tokens: tokenize the data" in line
