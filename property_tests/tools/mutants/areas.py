"""Areas around the stages: the files whose mutants are sampled, and the tests of each area."""

from collections.abc import Callable
from dataclasses import dataclass

from tools import ROOT
from tools.mutants.made import Mutant, mutants_of
from tools.mutants.triton import mutants_of_triton


@dataclass(frozen=True)
class Area:
    """Files (globs), the function that makes their mutants, and arguments of pytest.

    first: (part of a file's name, part of the names of tests that run first for it).
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]
    made: Callable[[str, int], list[Mutant]] = mutants_of
    not_these: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()

    @property
    def paths(self) -> list[str]:
        """Its files, relative to the root, sorted."""
        found = {str(path.relative_to(ROOT)) for glob in self.files for path in ROOT.glob(glob)}
        return sorted(path for path in found if not path.endswith(self.not_these or ("__init__.py",)))

    def tests_of(self, file: str) -> tuple[str, ...]:
        """Its tests, in the order in which they run for a file's mutants."""
        first = next((test for part, test in self.first if part in file), "")
        return tuple(sorted(self.tests, key=lambda path: first not in path))


def _all(*globs: str) -> tuple[str, ...]:
    return tuple(
        sorted(str(path.relative_to(ROOT)) for glob in globs for path in ROOT.glob(f"property_tests/test_{glob}.py"))
    )


AREAS: dict[str, Area] = {
    "checkpoint": Area(
        ("moe_fn/checkpoint/*.py", "moe_fn/checkpoint/quantized/*.py"), _all("checkpoint*", "module_lists", "bad_input")
    ),
    "quant": Area(
        ("moe_fn/quant/*.py", "moe_fn/weights/quantize.py"),
        _all("quant_numbers", "quant", "quant_native", "quant_tables", "checkpoint_quantized", "bad_input"),
    ),
    "parallel": Area(
        ("moe_fn/parallel/*.py", "moe_fn/balance/meeting.py", "moe_fn/ops/collectives.py"),
        (
            *_all(
                "parallel", "bad_input", "bad_parallel", "around_the_experts", "expert_parallel", "faults", "*_ranks"
            ),
            "compile_tests/test_parallel_traffic.py",
        ),
    ),
    "balance": Area(("moe_fn/balance/*.py",), _all("eplb*", "balance*", "layer", "bad_input")),
    "layer": Area(
        (
            "moe_fn/layer/*.py",
            "moe_fn/fused/*.py",
            "moe_fn/kernels/arguments.py",
            "moe_fn/kernels/options.py",
            "moe_fn/kernels/*/support.py",
        ),
        (
            *_all(
                "layer",
                "stages*",
                "around_the_experts",
                "change_path*",
                "route",
                "preparing",
                "lora",
                "bad_input",
                "quant",
                "quant_native",
                "native_backward",
                "parallel",
            ),
            "compile_tests/test_op_contracts.py",
            "compile_tests/test_one_graph.py",
            "compile_tests/test_contexts.py",
        ),
    ),
    "transformers": Area(("moe_fn/integrations/transformers/*.py",), _all("transformers_*", "bad_input")),
    "families": Area(
        ("moe_fn/families/*.py",), _all("family_*", "transformers_zoo", "checkpoint_families", "bad_input")
    ),
    "triton": Area(
        ("moe_fn/kernels/triton/*.py", "moe_fn/kernels/triton/quant/*.py"),
        _all("triton_*"),
        mutants_of_triton,
        ("__init__.py",),
        (
            ("triton/quant/", "_quant"),
            ("small_batch", "_quant"),
            ("top_k", "_top_k"),
            ("combine", "_rows"),
            ("metadata", "_rows"),
            ("products", "_products"),
            ("up", "_products"),
            ("activation", "_products"),
        ),
    ),
}
