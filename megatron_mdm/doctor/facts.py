"""Versions, GPUs, libraries and environment variables of this process."""

import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import megatron_mdm
from megatron_mdm import libraries
from megatron_mdm.environment import silent_import
from megatron_mdm.errors import UserError
from megatron_mdm.experiments.program import program_in
from megatron_mdm.libraries import REQUIRED, TRANSFORMER_ENGINE, Library
from megatron_mdm.versions import check_megatron, installed, megatron_folder

# Distributions whose version is reported if they are installed, beside those that always are.
OPTIONAL = (
    *("flash-attn", "lm-eval", "matplotlib", "mamba-ssm", "numpy", "nvidia-resiliency-ext"),
    *("tensorboard", "tokenizers", "transformers", "triton"),
)
# Environment variables with which ranks must agree: those that start so.
FAMILIES = (
    *("CUBLAS_", "CUDA_", "CUDNN_", "GLOO_", "LD_", "MKL_", "NCCL_", "NVSHMEM_", "NVTE_"),
    *("OMP_", "PYTHONPATH", "PYTORCH_", "TORCH_", "UCX_"),
)
# The only ones whose values are printed. The values of all others stay private.
SHOWN = (
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES"),
    *("GLOO_SOCKET_IFNAME", "MKL_NUM_THREADS", "NCCL_ALGO", "NCCL_BUFFSIZE"),
    *("NCCL_COLLNET_ENABLE", "NCCL_CROSS_NIC", "NCCL_CUMEM_ENABLE", "NCCL_DEBUG"),
    *("NCCL_DEBUG_SUBSYS", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_SL"),
    *("NCCL_IB_TC", "NCCL_IB_TIMEOUT", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS", "NCCL_NET"),
    *("NCCL_NET_GDR_LEVEL", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"),
    *("NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
    *("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "NVTE_DEBUG", "NVTE_DEBUG_LEVEL"),
    *("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "OMP_NUM_THREADS"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE"),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
)
IMPORT_SECONDS = 180  # a cold file system takes minutes for the libraries of Transformer Engine
# Names of problems, by which features ask for them.
TORCH, MEGATRON, HELPERS, CUDA = "torch", "megatron-core", "dataset helpers", "CUDA"
PACKAGES = "required packages"


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory_gib: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """Facts about one process; plain values, so that ranks can exchange them."""

    versions: dict[str, str | None]
    """Versions by the names that the report prints; None: not installed."""

    gpus: tuple[Gpu, ...]

    libraries: frozenset[str]
    """Modules of the installed ones of `megatron_mdm.libraries`."""

    problems: dict[str, str]
    """Why something that is needed cannot be used, by its name; one line each."""

    environment: dict[str, str]
    """Environment variables of `FAMILIES`."""

    host: str
    """Name of the node; a report prints it only to tell nodes apart."""

    @property
    def cuda(self) -> tuple[int, ...]:
        """CUDA version of torch; empty for a torch without CUDA."""
        return tuple(int(x) for x in re.findall(r"\d+", self.versions["CUDA of torch"] or ""))

    @property
    def shown_environment(self) -> dict[str, str]:
        """The environment variables that are set and whose values may be printed."""
        return {name: self.environment[name] for name in SHOWN if name in self.environment}


def collect() -> Facts:
    """Collects the facts about this process. It imports torch, which takes seconds."""
    problems: dict[str, str] = {}
    try:
        check_megatron()
    except UserError as error:
        problems[MEGATRON] = _line(str(error))
    if absent := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        problems[PACKAGES] = (
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: "
            f"pip install {' '.join(absent)}"
        )
    of_torch, gpus = _ask_torch(problems)
    if MEGATRON not in problems:
        _load_helpers(problems)
    if TRANSFORMER_ENGINE.is_installed():
        _import_apart(TRANSFORMER_ENGINE, f"{TRANSFORMER_ENGINE.module}.pytorch", problems)
    versions = {
        "megatron-mdm": megatron_mdm.__version__,
        "source": program_in(Path(megatron_mdm.__file__).parents[1]),
        "Python": installed("Python"),
        "Linux": platform.release(),
        "megatron-core": installed("megatron-core"),
        "torch": installed("torch"),
        **of_torch,
        "driver": driver(),
        "transformer-engine": installed("transformer-engine"),
        "apex": apex(),
        **{name: version for name in OPTIONAL if (version := installed(name))},
    }
    known = [value for value in vars(libraries).values() if isinstance(value, Library)]
    return Facts(
        versions,
        gpus,
        frozenset(library.module for library in known if library.is_installed()),
        problems,
        {name: value for name, value in os.environ.items() if name.startswith(FAMILIES)},
        socket.gethostname(),
    )


def _ask_torch(problems: dict[str, str]) -> tuple[dict[str, str | None], tuple[Gpu, ...]]:
    """The versions of the libraries that torch uses, and its GPUs; adds to `problems`."""
    versions: dict[str, str | None] = dict.fromkeys(("CUDA of torch", "cuDNN", "NCCL"))
    if installed(TORCH) is None:
        problems[TORCH] = "torch is not installed: pip install torch (https://pytorch.org)"
        return versions, ()
    try:
        with silent_import():
            import torch
    except Exception as error:  # a broken installation may raise any exception; it is reported
        problems[TORCH] = f"torch cannot be imported ({_line(str(error))}): install it again"
        return versions, ()
    versions["CUDA of torch"] = torch.version.cuda
    if (number := torch.backends.cudnn.version()) is not None:
        versions["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    if torch.version.cuda is not None:
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if not torch.cuda.is_available():
        problems[CUDA] = (
            f"no CUDA device was found ({_reason_without_cuda(torch)}): nvidia-smi shows what the "
            "driver sees; in a container: --gpus all"
        )
        return versions, ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return versions, tuple(
        Gpu(x.name, round(x.total_memory / 2**30), (x.major, x.minor)) for x in found
    )


def _reason_without_cuda(torch: Any) -> str:
    """Torch's own reason for finding no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return _line(str(error)).split(". ")[0].rstrip(".")
    return "CUDA_VISIBLE_DEVICES hides them, or there is none"


def _load_helpers(problems: dict[str, str]) -> None:
    """Loads Megatron's compiled dataset helpers without Megatron; adds to `problems`."""
    folder = megatron_folder()
    assert folder is not None  # its version was checked
    spec = PathFinder.find_spec("helpers_cpp", [str(folder / "datasets")])
    mend = (
        "pip install --no-deps --force-reinstall megatron-core or, for a checkout, make -C "
        "megatron/core/datasets in it"
    )
    if spec is None:
        problems[HELPERS] = f"Megatron's compiled dataset helpers are missing: {mend}"
        return
    try:
        importlib.util.module_from_spec(spec)
    except ImportError as error:
        line = _line(str(error)).replace(f"{folder}/", "")
        problems[HELPERS] = f"Megatron's dataset helpers cannot be loaded ({line}): {mend}"


def _import_apart(library: Library, module: str, problems: dict[str, str]) -> None:
    """Imports a library in a process of its own, which it may end; adds to `problems`."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True, text=True, timeout=IMPORT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        problem = f"{IMPORT_SECONDS} s did not suffice"
    else:
        if ended.returncode == 0:
            return
        lines = ended.stderr.strip().splitlines() or [f"status {ended.returncode}"]
        problem = _line(lines[-1])
    problems[library.name] = (
        f"{library.name} is installed and cannot be imported ({problem}): build it against this "
        f"torch, or take the torch that it was built against ({library.install})"
    )


def _line(text: str) -> str:
    """The first line of a text, with ~ for the home directory."""
    first = (text.strip().splitlines() or ["no reason given"])[0]
    return first.replace(str(Path.home()), "~")


def driver() -> str | None:
    """The version of NVIDIA's driver, or None if no driver answers."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text):
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if ended.returncode == 0 and ended.stdout.strip():
            return ended.stdout.split()[0]
    return None


def apex() -> str | None:
    """The version of apex. It says so if the package is not NVIDIA's, but another project."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    version = installed("apex") or "of unknown version"
    folders = map(Path, spec.submodule_search_locations or ())
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return version
    return f"{version}, another project than NVIDIA's: pip uninstall apex"
