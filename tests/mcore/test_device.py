"""The CPU mode: inside it, cuda means the CPU; after it, torch is as it was before."""

import threading

import pytest
import torch

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.data.batch import side_by_side
from megatron_mdm.mcore.device import CPU, cpu_mode, training_device


def snapshot():
    return {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}


def test_cuda_means_the_cpu_inside_and_nothing_is_left_outside():
    before = snapshot()
    with cpu_mode():
        assert torch.cuda.is_available()
        assert torch.zeros(2, device="cuda").device == CPU
        assert torch.zeros(2, device=torch.device("cuda:0")).cuda().pin_memory().device == CPU
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    assert snapshot() == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_it_is_left_after_an_exception():
    before = snapshot()
    with pytest.raises(RuntimeError), cpu_mode():
        raise RuntimeError
    assert snapshot() == before


def test_stand_ins_are_distinct_functions():
    """Torch keeps tables keyed by function; one function under two names would confuse them."""
    before = snapshot()
    with cpu_mode():
        changed = [f for name, f in snapshot().items() if f is not before[name] and callable(f)]
    assert len({id(f) for f in changed}) == len(changed)


def test_the_mode_covers_this_thread_only():
    def work():
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            seen.append(error)

    seen = []
    if torch.version.cuda is None or not torch.cuda.is_available():
        with cpu_mode():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert seen


@pytest.mark.parametrize("pinned", [True, False])
def test_rows_that_are_pinned_stay_pinned(pinned, monkeypatch):
    """A copy to a GPU from unpinned memory blocks the host. Without a GPU nothing can be pinned."""
    asked, empty = [], torch.empty

    def recording_empty(*args, pin_memory, **kwargs):
        asked.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", recording_empty)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: pinned)
    parts = [torch.tensor([[1], [2]]), torch.tensor([[3, 4], [5, 6]])]
    assert side_by_side(parts).tolist() == [[1, 3, 4], [2, 5, 6]]
    assert asked == [pinned]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_flag_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate.py"])
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # so that the tool's change is undone
    with pytest.raises(UserError, match="add --mdm-device cpu"), training_device("cuda"):
        pass
    with pytest.raises(UserError, match="add --device cpu"), open_checkpoint("nowhere", "cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_untouched():
    before = snapshot()
    with training_device("cuda"):
        assert snapshot() == before
