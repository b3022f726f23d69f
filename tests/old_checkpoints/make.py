"""Makes the checkpoints of this directory again, with the commit that they represent.

    python tests/old_checkpoints/make.py

checks this commit out into a temporary directory and runs it there. It runs every case of cases.py
up to its checkpoint (CASE.tar.gz), and then on from the checkpoint (the losses in losses.json).
Beside the losses it writes logits of the checkpoint of `pretraining` on fixed tokens.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
ENVIRONMENT |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}

LOGITS = """
import json, sys
from megatron_mdm.checkpoint import open_checkpoint
with open_checkpoint("checkpoint", "cpu") as loaded:
    import torch
    tokens = torch.tensor([[1, 2, 3, 50, 5, 50, 7, 49]])
    print("LOGITS", json.dumps(loaded.logits(tokens)[0, 3].tolist()))
"""


def main() -> None:
    """Runs every case, and writes its checkpoint and losses."""
    from tests.old_checkpoints.cases import CASES, COMMIT, COMMON, SAVED, write_data

    losses = {}
    with tempfile.TemporaryDirectory() as temporary:
        code = f"{temporary}/code"
        git("worktree", "add", "--detach", code, COMMIT)
        try:
            for name, flags in CASES.items():
                directory = Path(temporary, name)
                directory.mkdir()
                write_data(directory)
                command = ["-m", "megatron_mdm.pretrain", *COMMON, *flags]
                run(code, directory, [*command, "--exit-interval", str(SAVED)])
                with tarfile.open(HERE / f"{name}.tar.gz", "w:gz") as tar:
                    tar.add(directory / "checkpoint", "checkpoint", filter=anonymous)
                if name == "pretraining":
                    output = run(code, directory, ["-c", LOGITS])
                    losses["logits"] = json.loads(output.partition("LOGITS ")[2].splitlines()[0])
                run(code, directory, command)
                losses[name] = scalars(str(directory / "tensorboard"))
        finally:
            git("worktree", "remove", "--force", code)
    (HERE / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


def run(code: str, directory: Path, command: list[str]) -> str:
    """Runs Python with the package from `code`, and returns its stdout."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": code}
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    """Name -> (iteration, value) of the scalars that a resumed run has to repeat."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory, size_guidance={"scalars": 0})
    events.Reload()
    names = ("mdm loss", "mdm loss validation", "grad-norm")
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry of an archive without an owner and a time."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def git(*words: str) -> None:
    """Runs git in this repository."""
    subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
    main()
