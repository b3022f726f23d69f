"""Megatron on a CPU: the changes that `--mdm-device cpu` makes. None of them is active on CUDA.

Megatron names the device `cuda` in some hundred places. `cpu_mode` leaves Megatron's code as it is
and makes these places mean the CPU while the context is entered:

1. a TorchFunctionMode rewrites `device="cuda"` to the CPU in every torch call of this thread and
   turns off pinned memory;
2. stand-ins replace the functions of torch.cuda that Megatron calls (streams, memory, generators);
3. repairs replace four functions of Megatron that fail, or differ between layouts, without a GPU.

The mode also works on a machine that has a GPU. The GPU then stays idle.
"""

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_mdm.errors import UserError

CPU = torch.device("cpu")

# Defaults that replace Megatron's on a CPU. A flag on the command line still wins.
CPU_DEFAULTS = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    # The all-to-all dispatcher gathers shards of unequal sizes between tensor-parallel experts.
    # gloo requires equal sizes.
    "moe_token_dispatcher_type": "allgather",
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
}


@contextlib.contextmanager
def training_device(device: str, flag: str = "--mdm-device") -> Iterator[None]:
    """Context in which Megatron trains on `device`.

    Args:
        device: `cuda` or `cpu`.
        flag: the program's flag that chooses the device; the error names it.

    Raises:
        UserError: `device` is `cuda` and no CUDA device was found.
    """
    if device == "cpu":
        with cpu_mode():
            yield
        return
    if not torch.cuda.is_available():
        raise UserError(f"no CUDA device was found: add {flag} cpu to run on the CPU")
    yield


@contextlib.contextmanager
def cpu_mode() -> Iterator[None]:
    """Context in which `cuda` means the CPU for this thread (see the module's docstring)."""
    with contextlib.ExitStack() as stack:
        for name, value in _cuda_stand_ins().items():
            stack.enter_context(replaced(torch.cuda, name, value))
        stack.enter_context(replaced(torch.cuda.random, "get_rng_state", _get_rng_state))
        # Loader workers would otherwise try to pin memory through the accelerator interface.
        stack.enter_context(replaced(torch.accelerator, "is_available", _false))
        for owner, name, value in _megatron_repairs():
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(_CudaMeansCpu())
        logger = logging.getLogger("megatron.core.tensor_parallel.random")
        logger.addFilter(_is_not_about_generators)
        stack.callback(logger.removeFilter, _is_not_about_generators)
        yield


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of torch calls; see cpu_mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Optimizers sort parameters by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _Event:
    """A CUDA event on a device where everything is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 0.0


class _Stream(_Event):
    """A CUDA stream on a device where everything is synchronous."""

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Generators:
    """torch.cuda.default_generators, where every device has the CPU's generator."""

    def __getitem__(self, _: Any) -> torch.Generator:
        return torch.default_generator


def _is_not_about_generators(record: logging.LogRecord) -> bool:
    """Drops a warning that would appear at every draw: both devices share one generator here."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _false() -> bool:
    return False


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _cuda_stand_ins() -> dict[str, Any]:
    """Stand-ins by name. Each is a distinct function: torch keeps tables keyed by function."""

    def memory(name: str) -> tuple[str, Any]:
        return name, lambda *_, **__: 0

    return {
        "is_available": lambda: True,
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda *_, **__: None,
        "synchronize": lambda *_, **__: None,
        "empty_cache": lambda *_, **__: None,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda _: contextlib.nullcontext(),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, name="cpu"),
        "get_rng_state": _get_rng_state,
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "manual_seed_all": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "default_generators": _Generators(),
        "_lazy_call": lambda function, **_: function(),
        "_lazy_init": lambda *_, **__: None,
        **dict(
            memory(name)
            for name in (
                "memory_allocated",
                "max_memory_allocated",
                "memory_reserved",
                "max_memory_reserved",
                "device_memory_used",
                "reset_peak_memory_stats",
            )
        ),
    }


def _megatron_repairs() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) of the functions of Megatron that need a GPU."""
    import megatron.training.initialize as initialize
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.moe import token_dispatcher

    state_dict = DistributedOptimizer.state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict_with_moments(self: Any) -> dict:
        """Allocates AdamW's state first: Megatron reads its `step` before the first step."""
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return state_dict(self)

    @torch.no_grad()
    def set_states_and_step(self: Any, model_param: Any, tensors: dict) -> None:
        """Adds AdamW's `step`, which Megatron expects among the loaded tensors, where it is not."""
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        # Each parameter gets its own copy: the loaded step is one tensor that all of them share.
        state["step"] = state["step"].clone()
        set_states(self, model_param, {**tensors, "step": state["step"]})

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Returns a tensor that is on the CPU already; Megatron's own asserts that it is not."""
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    return [
        # It draws an amount of random numbers that depends on the layout. Initial weights would
        # then depend on the layout too.
        (initialize, "_warmup_jit_function", lambda *_, **__: None),
        (DistributedOptimizer, "state_dict", state_dict_with_moments),
        (DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_and_step),
        (token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu),
    ]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which owner.name is value."""
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
