"""The example of expert parallelism runs as it is, on two ranks and on one; it checks the losses itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLE = Path(__file__).parent.parent / "examples" / "expert_parallel.py"
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not EXAMPLE.exists(), reason="torch without distributed, or no examples"
)
SHORT = [str(EXAMPLE), "--steps", "3", "--tiny", "--generate", "4"]


def output_of(command: list[str]) -> str:
    """Returns the output of a command; fails for a nonzero exit status, and after 100 s."""
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLE.parent.parent, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(["--ep", "2"], id="experts"),
        pytest.param(["--tp", "2", "--ep", "1"], id="slices", marks=pytest.mark.thorough),
    ],
)
def test_two_ranks_train_as_one_process_does(how: list[str]) -> None:
    text = output_of(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SHORT, *how])
    alone, together = (re.search(rf"^losses, {name}:(.*)$", text, re.MULTILINE) for name in ("1 process", "2 ranks"))
    assert alone and together, text
    assert [float(a) for a in alone.group(1).split()] == pytest.approx(
        [float(b) for b in together.group(1).split()], abs=1e-4
    )
    rows = re.findall(r"^ +[01] +(\d+) +(\d+) +(\d+) +(\d+\.\d+)$", text, re.MULTILINE)  # experts, peak, sent, load
    assert len(rows) == 2 and all(int(sent) > 0 for _, _, sent, _ in rows), text
    assert [int(memory) for memory, *_ in rows] == [384] * 2


def test_one_process_needs_no_launcher() -> None:
    assert "1 rank" in output_of(SHORT)
