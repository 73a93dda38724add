"""Examples that need transformers run with their smallest sizes, each in its own process, and print the documented
results.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


def printed(example: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def cells(text: str, start: str) -> list[str]:
    """Returns the cells of the table row whose first cell starts with the text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("| ").split("|")]


QUICK = ("--tiny", "--backend", "aot_eager", "--prompt", "8", "--new", "3", "--seconds", "0.01")


def assert_equal_and_whole(text: str, graphs: str) -> None:
    for row in ("moe_fn |", "moe_fn compiled"):
        _, prefill, decode, found, breaks, _, relative, same = cells(text, row)
        assert float(prefill.replace(",", "")) > 0 and float(decode.replace(",", "")) > 0
        assert float(relative) < 1e-4 and same == "yes"
    assert (found, breaks) == (graphs, "0")
    assert "graphs made while the clock ran: 0" in text


@pytest.mark.thorough
def test_a_folder_before_and_after(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import torch
        from small_models import small_model
    finally:
        sys.path.pop(0)
    small_model("gpt-oss", torch.float32, tiny=True).save_pretrained(tmp_path)
    text = printed("hf_model", *QUICK, "--checkpoint", str(tmp_path))
    # the second graph is that of transformers' cache, which counts the tokens of a window in Python
    assert_equal_and_whole(text, "1 + 2")
    assert "1 blocks replaced, 0 left" in text


@pytest.mark.thorough
def test_a_replaced_model_is_exported_and_run_elsewhere() -> None:
    text = printed("export", "--tiny", "--model", "mixtral")
    assert "1 x moe_fn::routed_experts" in text
    for row in ("torch.export, strict", "torch.export |", "AOTInductor"):
        assert float(cells(text, row)[6]) < 1e-5


@pytest.mark.thorough
def test_the_coverage_table_is_measured_and_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- coverage -->\nold\n<!-- /coverage -->\nafter\n")
    text = printed("coverage", "--only", "gpt_oss,dbrx,doge", "--seeds", "1", "--write", str(page))
    written = page.read_text()
    assert written == f"before\n<!-- coverage -->\n{text}<!-- /coverage -->\nafter\n"
    assert re.search(r"\| `gpt_oss` \| plain, limit bites, alpha \| \de-0[6-9] \| yes \| yes \|", text)
    assert re.search(r"\| `dbrx` \|.*\| outside \| yes \|", text)
    assert "product-key retrieval" in text and "3 model directories" in text
