"""The doctor: what it finds here, what it would say about other machines, and ranks that differ."""

import dataclasses
import importlib.machinery
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
import torch

import megatron_mdm
from megatron_mdm.doctor import agreement, facts
from megatron_mdm.doctor.__main__ import Report, _not_runnable, main
from megatron_mdm.doctor.facts import HELPERS, SHOWN, Gpu, collect
from megatron_mdm.doctor.features import FEATURES
from megatron_mdm.libraries import FP8_RECIPES, REQUIRED, TRANSFORMER_ENGINE
from megatron_mdm.mcore.flags.arguments import parse_only
from megatron_mdm.versions import TESTED, TORCH, installed
from tests import HAS_TRANSFORMER_ENGINE, ROOT, ranks

PROGRAM = "megatron_mdm/doctor/__main__.py"
GPUS = {"A100": (8, 0), "L40": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX PRO 6000": (12, 0)}
ENGINE = "--bf16 --transformer-impl transformer_engine"


@pytest.fixture(scope="module")
def here():
    """Facts about this process."""
    return collect()


@pytest.fixture(scope="module")
def machine(here):
    """Makes the facts of a machine with a GPU and Transformer Engine."""

    def make(gpu, cuda="13.0", libraries=(TRANSFORMER_ENGINE.module,), engine="2.20.2", **problems):
        return dataclasses.replace(
            here,
            versions={**here.versions, "CUDA of torch": cuda, "transformer-engine": engine},
            gpus=(Gpu(gpu, 80, GPUS[gpu]),) * 8,
            libraries=frozenset({"tensorboard", *libraries}),
            problems=problems,
        )

    return make


def can_run(found):
    return {feature.name for feature in FEATURES if feature.obstacle(found) is None}


def obstacle(name, found):
    (feature,) = (feature for feature in FEATURES if feature.name == name)
    return feature.obstacle(found)


# This process


def test_versions_are_those_of_the_libraries(here):
    assert here.versions["torch"] == installed("torch")
    assert here.versions["CUDA of torch"] == torch.version.cuda
    assert here.versions["megatron-mdm"] == megatron_mdm.__version__
    assert here.versions["cuDNN"].replace(".", "")[0] == str(torch.backends.cudnn.version())[0]
    assert here.problems.keys() <= {"CUDA", TRANSFORMER_ENGINE.name}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="needs a machine without Transformer Engine")
def test_without_a_gpu(here):
    found = can_run(here)
    assert {"CPU mode", "HybridModel", "asynchronous saves", "TensorBoard", "pictures"} <= found
    assert not {"local layers on a GPU", "context parallelism"} & found
    assert obstacle("local layers on a GPU", here) == "no GPU"
    assert obstacle("FP8, --fp8-recipe mxfp8", here) == (
        "no GPU; Transformer Engine is not installed: README.md, section Install"
    )
    text = "\n".join(Report([here], [], [], []).lines())
    assert text.count("  none: no CUDA device was found (") == text.count("nvidia-smi") == 1
    assert "  transformer-engine     - (sources read: 2.14 to 2.20)\n" in text


def test_each_version_has_its_tested_range(machine):
    found = machine("H100", engine="2.16.0")
    versions = {**found.versions, "torch": TORCH.last, "megatron-core": "0.20.0"}
    report = Report([dataclasses.replace(found, versions=versions)], [], [], [])
    lines = [" ".join(line.split()) for line in report.lines()]
    assert f"torch {TORCH.last} (tested)" in lines
    assert "megatron-core 0.20.0 (not tested; tested: 0.19.0 to 0.19.2)" in lines
    assert "transformer-engine 2.16.0 (sources read)" in lines
    data = report.as_json()
    assert [x["name"] for x in data["tested"]] == list(TESTED)
    assert data["untested"] == ["megatron-core"]


def test_the_report_in_json():
    absent = ["transformers", "matplotlib", "scipy", "omegaconf"]
    run = ranks.run_forked(PROGRAM, "--json", without=absent)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    lines = {feature["name"]: feature["obstacle"] for feature in report["features"]}
    assert lines["pictures"] == "matplotlib is not installed: pip install 'megatron-mdm[plot]'"
    line = "scipy, omegaconf are not installed: pip install scipy omegaconf"
    assert lines["CPU mode"] == line and lines["HybridModel"] == line
    names = [name for name in lines if "transformers is not installed" in (lines[name] or "")]
    assert len(names) == 2
    assert report["status"] == 0 and report["ranks"] == 1


def test_the_required_packages_are_those_of_setup_py():
    needed = re.findall(r'^ {8}"([a-z-]+)[^":]*",', (ROOT / "setup.py").read_text(), re.M)
    assert {*REQUIRED, "megatron-core", "torch"} == set(needed)


def test_neither_torch_nor_megatron(tmp_path):
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    command = [sys.executable, "-S", "-m", "megatron_mdm.doctor"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def run(*words):
        return subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=100
        )

    ended = run()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "no  CPU mode: torch is not installed: pip install torch" in ended.stdout
    ended = run("--", "--mdm-device", "cpu")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "cannot run here: megatron-core is not installed: pip install" in ended.stdout


def test_a_megatron_that_is_too_old(tmp_path, monkeypatch):
    (tmp_path / "megatron/core").mkdir(parents=True)
    (tmp_path / "megatron/core/__init__.py").touch()
    (tmp_path / "megatron/core/package_info.py").write_text('__version__ = "0.18.0"\n')
    monkeypatch.setattr(facts, "megatron_folder", lambda: tmp_path / "megatron/core")
    monkeypatch.setattr("megatron_mdm.versions.megatron_folder", facts.megatron_folder)
    found = collect()
    assert found.versions["megatron-core"] == "0.18.0"
    line = obstacle("CPU mode", found)
    assert line.startswith("megatron-core 0.18.0 in ") and "pip install" in line


def test_dataset_helpers_that_are_missing_or_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "megatron_folder", lambda: tmp_path)
    (tmp_path / "datasets").mkdir()
    problems = {}
    facts._load_helpers(problems)
    assert problems[HELPERS].startswith("Megatron's compiled dataset helpers are missing: pip")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"datasets/helpers_cpp{suffix}").write_text("no library")
    importlib.invalidate_caches()
    facts._load_helpers(problems)
    assert problems[HELPERS].startswith("Megatron's dataset helpers cannot be loaded (")


@pytest.mark.ranks
def test_a_library_that_is_installed_and_cannot_be_imported(machine):
    problems = {}
    facts._import_apart(TRANSFORMER_ENGINE, "json.no_such_part", problems)
    line = problems[TRANSFORMER_ENGINE.name]
    assert "cannot be imported (ModuleNotFoundError: No module named 'json.no_such_part'" in line
    found = machine("H100", **problems)
    assert obstacle("context parallelism", found) == line
    assert obstacle("local layers on a GPU", found) is None


@pytest.mark.parametrize("part, is_nvidias", [("multi_tensor_apply", True), ("lib", False)])
def test_which_apex_is_installed(part, is_nvidias, tmp_path, monkeypatch):
    (tmp_path / "apex" / part).mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert ("another project than NVIDIA's: pip uninstall apex" in facts.apex()) != is_nvidias


# Other machines


@pytest.mark.parametrize(
    "gpu, cuda, recipes",
    [
        ("A100", "13.0", ""),
        ("L40", "13.0", "delayed tensorwise"),
        ("H100", "12.8", "delayed tensorwise"),
        ("H100", "12.9", "delayed tensorwise blockwise"),
        ("B200", "13.0", "delayed tensorwise blockwise mxfp8"),
        ("RTX PRO 6000", "13.0", "delayed tensorwise blockwise"),
    ],
)
def test_recipes_of_fp8_on_a_gpu(gpu, cuda, recipes, machine):
    found = machine(gpu, cuda)
    assert "Transformer Engine's layers" in can_run(found)
    assert [x for x in FP8_RECIPES if f"FP8, --fp8-recipe {x}" in can_run(found)] == recipes.split()


def test_the_obstacles_of_fp8_say_what_to_use_instead(machine):
    line = obstacle("FP8, --fp8-recipe mxfp8", machine("H100"))
    assert line == (
        "needs a GPU of compute capability 10.0, below 12.0, this one has 9.0: use --fp8-format "
        "hybrid --fp8-recipe delayed"
    )
    line = obstacle("FP8, --fp8-recipe blockwise", machine("H100", "12.8"))
    assert (
        line == "needs CUDA 12.9, this torch has 12.8: use --fp8-format hybrid --fp8-recipe delayed"
    )
    assert obstacle("FP8, --fp8-recipe delayed", machine("A100")).endswith(": use --bf16 alone")


def test_parts_that_an_old_transformer_engine_lacks(machine):
    found = can_run(machine("B200", engine="2.2.1"))
    assert "FP8, --fp8-recipe tensorwise" in found
    assert not {"FP8, --fp8-recipe blockwise", "FP4, --fp4-recipe nvfp4"} & found
    line = obstacle("FP4, --fp4-recipe nvfp4", machine("H100", engine="2.7"))
    assert line.startswith("transformer-engine 2.7 has no NVFP4BlockScaling, which --fp4-format ")
    assert "; needs a GPU of compute capability 10.0, this one has 9.0: use --fp8-format" in line
    assert obstacle("FP4, --fp4-recipe nvfp4", machine("B200", engine="2.8")) is None


@pytest.mark.parametrize(
    "flags, libraries, beginnings",
    [
        ("--mdm-device cpu --fp8-format hybrid", [], ["--fp8-format with --fp8-recipe delayed"]),
        ("--bf16 --transformer-impl local", [], []),
        (ENGINE, [TRANSFORMER_ENGINE.module], []),
        (ENGINE, [], ["--transformer-impl transformer_engine"]),
        (
            f"{ENGINE} --context-parallel-size 2 --mdm-isolate-documents",
            [],
            ["--transformer-impl", "--mdm-isolate-documents or", "--context-parallel-size cannot"],
        ),
        (f"{ENGINE} --fp8-format hybrid", [TRANSFORMER_ENGINE.module], []),
        (
            f"{ENGINE} --fp8-format hybrid --fp8-recipe mxfp8",
            [TRANSFORMER_ENGINE.module],
            ["--fp8-format with --fp8-recipe mxfp8 cannot run here: needs a GPU of"],
        ),
        (
            f"{ENGINE} --fp4-format e2m1",
            [TRANSFORMER_ENGINE.module],
            ["--fp4-format with --fp4-recipe nvfp4 cannot run here: needs a GPU of"],
        ),
        ("--mdm-device cpu --async-save", [], []),
        ("--mdm-device cpu --async-save --async-strategy nvrx", [], ["--async-strategy nvrx"]),
        ("--mdm-device cpu --tensorboard-dir tb", [], []),
        (
            "--mdm-device cpu --tokenizer-type HuggingFaceTokenizer",
            [],
            ["--tokenizer-type HuggingFaceTokenizer cannot run here: transformers is not install"],
        ),
        ("--mdm-device cpu --hybrid-layer-pattern *-*-", [], []),
    ],
)
def test_flags_that_cannot_run_on_an_h100(flags, libraries, beginnings, machine, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags.split()])
    found = [machine("H100", libraries=libraries)]
    lines = _not_runnable(parse_only(), found)
    assert [line[: len(begin)] for line, begin in zip(lines, beginnings, strict=True)] == beginnings
    assert Report(found, flags.split(), lines, []).status == bool(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_program_with_flags_of_a_launch():
    run = ranks.run_forked(PROGRAM, "--bf16", "--transformer-impl", "local")  # as torchrun does
    assert run.returncode == 1, run.stderr
    assert "--transformer-impl local cannot run here: no GPU\n" in run.stdout
    run = ranks.run_forked(PROGRAM, "--", "--mdm-device", "cpu", "--async-save")
    assert run.returncode == 0, run.stderr
    assert "they use can run here; the run checks the other flags" in run.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--", "--no-such-flag"], "error: --no-such-flag is neither an option of the doctor nor"),
        (["--jsno", "--", "--bf16"], "error: --jsno is neither an option of the doctor nor a flag"),
        (["--timeout", "0"], "error: --timeout 0: must be at least 1"),
    ],
)
def test_words_that_the_program_refuses(words, message):
    run = ranks.run_forked(PROGRAM, *words)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(message)


# Ranks


def differing_ranks():
    """Entry of two ranks, of which the second one has other environment variables."""
    if os.environ["RANK"] == "1":
        os.environ |= {"NCCL_ALGO": "Ring", "NCCL_DEBUG": "INFO", "NCCL_OTHER": "a secret"}
    sys.argv = ["doctor"]
    print("status", main())


def equal_ranks():
    """Entry of two ranks that are equal, but for a variable that may differ."""
    os.environ["NCCL_SOCKET_IFNAME"] = f"eth{os.environ['RANK']}"
    sys.argv = ["doctor", "--json"]
    print("status", main())


def a_rank_alone():
    """Entry of a rank that waits for a second one, which nobody starts."""
    os.environ["WORLD_SIZE"] = "2"
    sys.argv = ["doctor", "--timeout", "1"]
    try:
        main()
    except ValueError as error:
        print(f"error: {error}")
        sys.exit(2)


def test_ranks_whose_environments_differ(tmp_path):
    run = ranks.launch(tmp_path, 2, entry=differing_ranks)
    assert all(text.endswith("status 1\n") for text in run.output)
    lines = [line.strip() for line in run.output[0].splitlines()]
    (algorithm,) = (line for line in lines if "NCCL_ALGO" in line)
    assert algorithm.startswith("must be equal: NCCL_ALGO: not set on ")
    assert "(rank 0); Ring on " in algorithm and algorithm.endswith("(rank 1)")
    assert any(line.startswith("may differ: NCCL_DEBUG: ") for line in lines)
    (other,) = (line for line in lines if "NCCL_OTHER" in line)
    assert "a value that is not printed on" in other
    assert "a secret" not in run.output[0]
    assert "must be equal" not in run.output[1]  # one report


def test_ranks_that_agree(tmp_path):
    run = ranks.launch(tmp_path, 2, entry=equal_ranks)
    assert all(text.endswith("status 0\n") for text in run.output)
    report = json.loads(run.output[0].removesuffix("status 0\n"))
    (difference,) = report["differences"]
    assert difference["what"] == "NCCL_SOCKET_IFNAME" and not difference["must_be_equal"]


def test_a_rank_that_does_not_answer(tmp_path):
    run = ranks.launch(tmp_path, 1, entry=a_rank_alone, check=False)
    assert run.status == [2]
    assert "did not meet all 2 ranks over gloo in 1 s" in run.output[0]
    assert "Traceback" not in run.output[0]


def test_nodes_are_named_and_many_are_counted(here):
    def rank(number, **changes):
        return dataclasses.replace(here, host=f"node{number // 8}", **changes)

    old = {**here.versions, "torch": "2.10.0", "driver": "1.2"}
    found = [
        rank(number, versions=old) if 72 <= number < 80 else rank(number) for number in range(160)
    ]
    by_name = {difference.what: difference for difference in agreement.differences(found)}
    assert by_name["torch"].in_words(found) == (
        f"torch: {installed(TORCH.name)} on 19 nodes (152 ranks); 2.10.0 on node9 (ranks 72-79)"
    )
    assert by_name["torch"].is_fault and not by_name["driver"].is_fault
    assert by_name.keys() == {"torch", "driver"}


@pytest.mark.parametrize("change", ["gpus", "libraries", "problems"])
def test_nodes_that_differ_otherwise(change, machine):
    one = machine("H100")
    other = {
        "gpus": dataclasses.replace(one, gpus=one.gpus[:7]),
        "libraries": dataclasses.replace(one, libraries=frozenset()),
        "problems": machine("H100", helpers="they are missing"),
    }[change]
    (difference,) = agreement.differences([one, other])
    assert difference.is_fault


def test_only_variables_of_the_list_are_printed(here):
    found = dataclasses.replace(
        here, environment={"NCCL_ALGO": "Ring", "NCCL_KEY": "a secret", "CUDA_HOME": "/home/me"}
    )
    report = Report([found], [], [], [])
    text = "\n".join(report.lines()) + json.dumps(report.as_json())
    assert "NCCL_ALGO=Ring" in text
    assert "a secret" not in text and "/home/me" not in text
    assert all(name.startswith(facts.FAMILIES) for name in SHOWN)
