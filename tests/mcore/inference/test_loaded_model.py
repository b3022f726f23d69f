"""A checkpoint gives the same logits under every layout; tools/generate.py decodes with it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint.files import SavedCheckpoint
from megatron_mdm.mcore.inference.loaded_model import (
    LoadedModel,
    _set_blocks,
    args_for_inference,
)
from megatron_mdm.mcore.model.builder import model_config
from tests import ranks
from tests.ranks import entries

LAYOUTS = {"TP 1": (1, 1), "TP 2": (2, 1), "PP 2": (2, 2), "TP 2 x PP 2": (4, 2)}


def checkpoint(base):
    return base[base.index("--load") + 1]


@pytest.fixture(scope="module")
def logits(base, tmp_path_factory):
    """Layout -> per rank, (plain, shifted) logits, each for rows of two lengths."""
    found = {}
    for layout, (world, stages) in LAYOUTS.items():
        directory = tmp_path_factory.mktemp("logits")
        ranks.launch(directory, world, "--", checkpoint(base), str(stages), entry=entries.logits)
        found[layout] = [torch.load(directory / f"logits{rank}.pt") for rank in range(world)]
    return found


def test_every_layout_gives_the_same_logits_on_all_ranks(logits):
    one = logits["TP 1"][0][0]
    assert [x.shape for x in one] == [(3, 32, 128), (1, 7, 128)]
    assert one[0].std() > 0.1
    for layout, per_rank in logits.items():
        for plain, _ in per_rank:
            for x, y, first in zip(plain, one, per_rank[0][0], strict=True):
                assert torch.equal(x, first), layout  # otherwise ranks would decode different texts
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=layout)


def test_logits_of_a_shifted_model_stand_where_their_token_is(logits):
    for plain, shifted in logits["PP 2"]:
        for x, y in zip(plain, shifted, strict=True):
            assert torch.equal(y[:, 1:], x[:, :-1])
            assert torch.equal(y[:, 0], x[:, 0])


def test_a_shifted_model_is_not_asked_for_a_first_token(recorded):
    """This holds for the first token of a row, and of a document that sees no other."""
    recorded.mdm_shift, recorded.mdm_isolate_documents = True, False
    loaded = LoadedModel(
        None,
        args_for_inference(recorded, SavedCheckpoint("here", 20), "cpu", 1),
        SimpleNamespace(eod=9),
    )
    assert loaded.opening_token_id == 9
    mask = ranks.MASK_ID
    for tokens, documents in (([mask, 1], None), ([1, mask], [0, 1])):
        documents = None if documents is None else torch.tensor([documents])
        with pytest.raises(UserError, match="the first token of a row is masked, which a shifted"):
            loaded.logits(torch.tensor([tokens]), documents=documents)
    loaded.args.mdm_isolate_documents = True
    assert loaded.opening_token_id is None


def generate(base, directory, *flags, world=1, check=True):
    """Runs the tool. Returns its stdout, or its log if it fails."""
    command = ["tools/generate.py", "--device", "cpu", "--load", checkpoint(base), *flags]
    run = ranks.launch(directory, world, "--", *command, entry=entries.tool, check=check)
    if not check:
        assert set(run.status) != {0}
        return run.output[0]
    assert all((directory / f"stdout{rank}").read_text() == "" for rank in range(1, world))
    return (directory / "stdout0").read_text()


def test_texts_do_not_depend_on_layout_and_company(base, tmp_path):
    """Texts are sampled. Prompts differ in length, have gaps, and come from flags and a file."""
    file = tmp_path / "prompts.txt"
    file.write_text("3 4 5 6\n\n8 9<mask>11\n")
    common = ["--length", "9", "--steps", "6", "--block-length", "4", "--temperature", "1"]
    common += ["--no-stop-at-eos", "--prompt", "50 51", "--suffix", "7 8"]
    many = [*common, "--prompt", "", "--prompt", "60 61", "--prompts-file", str(file)]
    one = generate(base, tmp_path / "one", *many)
    assert one == generate(base, tmp_path / "batches of 1", *many, "--batch-size", "1")
    layout = ["--pipeline-model-parallel-size", "2"]
    assert one == generate(base, tmp_path / "stages", *many, *layout, world=2)
    lines = one.splitlines()
    assert lines[::2] == [f"== prompt {i}" for i in range(1, 6)]
    texts = [[int(token) for token in line.split()] for line in lines[1::2]]
    assert [len(text) for text in texts] == [13, 11, 13, 15, 15]
    starts = [[50, 51], [], [60, 61], [3, 4, 5, 6], [8, 9]]
    for text, start in zip(texts, starts, strict=True):
        assert text[: len(start)] == start and text[-2:] == [7, 8]
        assert max(text) < ranks.VOCAB
    assert texts[4][3] == 11
    assert generate(base, tmp_path / "alone", *common).split() == lines[1].split()
    assert generate(base, tmp_path / "seed", *common, "--seed", "1").split() != lines[1].split()


def test_guided_and_filtered_texts_are_those_of_one_rank(base, tmp_path):
    """Each rank holds a part of the vocabulary, and the filters sort all of it."""
    common = ["--length", "12", "--block-length", "4", "--prompt", "50 51 52", "--no-stop-at-eos"]
    sampled = [*common, "--temperature", "2", "--top-k", "60", "--top-p", "0.9"]
    texts = []
    for number, flags in enumerate((sampled, [*sampled, "--cfg-scale", "20"])):
        texts.append(generate(base, tmp_path / f"{number}", *flags))
        assert generate(base, tmp_path / f"{number} on 2", *flags, world=2) == texts[-1]
    greedy = generate(base, tmp_path / "greedy", *common)
    nearly = [*common, "--temperature", "1", "--top-k", "1"]
    assert generate(base, tmp_path / "nearly", *nearly) == greedy
    assert len({*texts, greedy}) == 3


def test_show_and_picture(base, tmp_path):
    flags = ["--prompt", "5 6", "--length", "6", "--steps", "3", "--no-stop-at-eos"]
    flags += ["--show", "--picture", str(tmp_path / "order.gif")]
    lines = generate(base, tmp_path / "run", *flags).splitlines()
    assert lines[0] == "step 0: 5 6" + "▒" * 6
    assert [line.split(":")[0] for line in lines[:4]] == [f"step {i}" for i in range(4)]
    assert [line.count("▒") for line in lines] == [6, 4, 2, 0, 0]
    assert lines[3] == f"step 3: {lines[4]}"
    assert (tmp_path / "order.gif").read_bytes()[:6] == b"GIF89a"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--length 0 --prompt 5", "prompt 1: nothing to write: give a --length of at least 1"),
        ("--length -1", "--length must be at least 0"),
        ("--length 30 --prompt 1<mask>2", "prompt 1: its tokens, --length and --suffix make 33"),
        ("--length 5 --steps 2 --block-length 2", "--steps 2 is less than one per block: 3 blocks"),
        ("--pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3 does not divide"),
        ("--picture order.svg", "--picture order.svg: must end in .png or .gif"),
        ("--picture a.png --prompt 1 --prompt 2", "--picture draws one prompt, and there are 2"),
        ("--prompts-file nowhere.txt", "nowhere.txt: cannot be read"),
        ("--mask-marker=", "--mask-marker must not be empty"),
        ("--top-k 5", "--top-k needs a --temperature above 0"),
        ("--messages nowhere.json", "nowhere.json: cannot be read"),
        ("--messages x --no-special-tokens", "--no-special-tokens: a chat template writes special"),
        ("--ignore-keys a", "--ignore-keys is for --messages: leave it out"),
        ("--messages setup.py", "--messages needs a checkpoint whose tokenizer has a chat"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(flags, message, base, tmp_path):
    log = generate(base, tmp_path, *flags.split(), check=False)
    assert "Traceback" not in log, log[-2000:]
    assert [line for line in log.splitlines() if line.startswith("error: ")] == [
        line for line in log.splitlines() if message in line
    ]
    assert message in log


@pytest.fixture
def diverged(base, tmp_path):
    """A copy of the checkpoint with a NaN in its last layer norm."""
    copy = Path(shutil.copytree(checkpoint(base), tmp_path / "diverged"))
    norm = ranks.weights(copy)["decoder.final_layernorm.weight"].numpy().tobytes()
    (path,) = (path for path in copy.glob("iter_*/*.distcp") if norm in path.read_bytes())
    nan = torch.tensor(torch.nan).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(norm, norm[:-4] + nan))
    (path.parent / "integrity.json").unlink()  # a run that diverged has sums of such weights
    return copy


def test_weights_that_are_no_numbers_are_named_on_every_rank(diverged, base, data, tmp_path):
    """The second stage holds these weights, and the first stage ends with the same line."""
    line = f"error: the checkpoint in {diverged} holds NaN or infinity in the tensor decoder.final"
    prompt = ["--length", "2", "--prompt", "1"]
    text = ["--data", str(data), "--json", str(tmp_path / "x.json")]
    stages = ["--pipeline-model-parallel-size", "2"]
    for world, tool, *flags in (
        (2, "generate", *prompt, *stages),
        (1, "evaluate", *text),
        (1, "variance_report", "--data", str(data), "--output", str(tmp_path / "x.json")),
        (1, "fit_ppots", "--output", str(tmp_path / "x.json")),
    ):
        command = [f"tools/{tool}.py", "--device", "cpu", "--load", str(diverged), *flags]
        run = ranks.launch(tmp_path / tool, world, "--", *command, entry=entries.tool, check=False)
        assert run.status == [2] * world
        for log in run.output:
            assert [x[: len(line)] for x in log.splitlines() if x.startswith("error")] == [line]
            assert "Traceback" not in log
    assert not list(tmp_path.glob("x.json*"))


@pytest.fixture
def recorded(base):
    """The arguments that the checkpoint records."""
    (directory,) = Path(checkpoint(base)).glob("iter_*")
    return load_common_state_dict(str(directory))["args"]


def test_a_checkpoint_from_before_a_flag_existed_opens(recorded):
    del recorded.mdm_ema_decay
    recorded.mdm_eps = 0.01
    args_for_inference(recorded, SavedCheckpoint("checkpoint", 20), "cpu", 1)
    assert MDMConfig.from_args(recorded) == MDMConfig(
        device="cpu",
        model="gpt",
        eps=0.01,
        mask_token_id=ranks.MASK_ID,
        vocab_size=128,
        row_order="epoch",
        rate_per="row",
    )


def test_the_device_of_the_training_does_not_matter(recorded):
    recorded.fp8, recorded.fp8_param_gather = "hybrid", True  # FP8 restricts the number of rows
    for device, backend in (("cuda", "nccl"), ("cpu", "gloo")):
        args = args_for_inference(recorded, SavedCheckpoint("checkpoint", 20), device, 1)
        assert args.distributed_backend == backend
        assert not args.fp8 and not args.fp8_param_gather


def test_a_model_goes_from_one_block_size_to_another(recorded):
    """Its clean copy stays causal. Whole rows have none, and no loss on it."""
    recorded.mdm_block_size, recorded.mdm_ar_loss_weight = 4, 1.0
    recorded.mdm_rate_per = "block"
    loaded = LoadedModel(None, recorded, None)
    assert loaded.in_blocks(8).block_size == 8 and loaded.in_blocks(8).causal_clean
    rows = loaded.in_blocks(None)
    assert rows.block_size is None and not rows.causal_clean
    assert rows.in_blocks(8).block_size == 8
    recorded.transformer_impl = "transformer_engine"
    assert loaded.in_blocks(8).block_size == 8 and loaded.in_blocks(None).block_size is None
    with pytest.raises(UserError, match="built for whole rows cannot run in blocks: open the"):
        loaded.in_blocks(None).in_blocks(8)


def test_blocks_of_a_checkpoint_that_was_trained_in_whole_rows(recorded):
    """Inference never anneals attention. Latent attention is refused in the words of training."""
    recorded.mdm_anneal_attention_iters = 10
    found = SavedCheckpoint("checkpoint", 20)
    _set_blocks(recorded, found, "4")
    loaded = LoadedModel(None, args_for_inference(recorded, found, "cpu", 1), None)
    assert loaded.block_size == 4 and loaded.in_blocks(None).mdm.attends_everywhere
    recorded.multi_latent_attention = True
    for size in ("row", "trained"):
        _set_blocks(recorded, found, "row")
        _set_blocks(recorded, found, size)
    with pytest.raises(UserError, match="^--block-size does not go with --multi-latent-attention"):
        _set_blocks(recorded, found, "4")


def test_a_tokenizer_that_moved_is_named(recorded):
    recorded.tokenizer_type, recorded.tokenizer_model = "SentencePieceTokenizer", "gone.model"
    with pytest.raises(UserError, match="the tokenizer of here is not at gone.model"):
        args_for_inference(recorded, SavedCheckpoint("here", 20), "cpu", 1)


def test_a_hugging_face_tokenizer_that_moved(recorded, tmp_path):
    recorded.tokenizer_type = "HuggingFaceTokenizer"
    for gone in (str(tmp_path / "old" / "huggingface"), "runs/sft/megatron/huggingface"):
        recorded.tokenizer_model = gone
        with pytest.raises(UserError, match=f"the tokenizer of {tmp_path} is not at {gone}: start"):
            args_for_inference(recorded, SavedCheckpoint(str(tmp_path), 20), "cpu", 1)
    own = tmp_path / "huggingface"  # where the conversion writes it
    own.mkdir()
    recorded.tokenizer_model = gone
    assert args_for_inference(
        recorded, SavedCheckpoint(str(tmp_path), 20), "cpu", 1
    ).tokenizer_model == str(own)


@pytest.mark.parametrize("name", ["owner/a-name.v2", "a-name", "runs/tokenizer"])
def test_a_tokenizer_of_a_repository_is_not_fetched(name, recorded, tmp_path, monkeypatch):
    """A copy that was downloaded before is used, if there is one."""
    from huggingface_hub import constants

    connections = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: connections.append(args))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recorded.tokenizer_type, recorded.tokenizer_model = "HuggingFaceTokenizer", name
    with pytest.raises(UserError, match=f"the tokenizer of here is not at {name}: start in"):
        args_for_inference(recorded, SavedCheckpoint("here", 20), "cpu", 1)
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert args_for_inference(
        recorded, SavedCheckpoint("here", 20), "cpu", 1
    ).tokenizer_model == str(snapshot)
    assert connections == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_checkpoint_of_a_run_in_fp8_does_not_compute_in_it(device, recorded):
    """FP8 products take multiples of 8 rows, and a text may have any length."""
    recorded.fp8, recorded.fp8_recipe, recorded.fp8_param_gather = "hybrid", "tensorwise", True
    recorded.moe_router_padding_for_fp8 = True
    args = args_for_inference(recorded, SavedCheckpoint("here", 20), device, 1)
    assert (args.fp8, args.fp8_param_gather, args.moe_router_padding_for_fp8) == (
        None,
        False,
        False,
    )
    config = model_config(args, MDMConfig.from_args(args))
    assert config.transformer.fp8 is None  # Megatron refuses one without the other


@pytest.mark.parametrize(
    "world, stages, message",
    [
        (6, 3, "--pipeline-model-parallel-size 3 does not divide the 4 layers"),
        (3, 1, "3 tensor-parallel ranks do not divide the 4 attention heads"),
        (2, 0, "--pipeline-model-parallel-size 0 does not divide the 2 ranks"),
    ],
)
def test_layouts_that_do_not_divide_the_model(world, stages, message, recorded, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError, match=message):
        args_for_inference(recorded, SavedCheckpoint("here", 20), "cpu", stages)
