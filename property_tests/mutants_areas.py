"""The areas around the stages whose mutants are sampled, and the tests that judge the mutants of each."""

from collections.abc import Callable
from dataclasses import dataclass

from mutants_made import ROOT, Mutant, mutants_of
from mutants_of_lines import mutants_of_lines


@dataclass(frozen=True)
class Area:
    """Files (globs), who makes their mutants, and arguments of pytest: the quickest tests first."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    made: Callable[[str, int], list[Mutant]] = mutants_of
    not_these: tuple[str, ...] = ()
    imported: str = "moe_fn"  # code that a program of this area runs: a change with which it fails is no mutant

    @property
    def paths(self) -> list[str]:
        """Its files, relative to the root, by name."""
        found = {str(path.relative_to(ROOT)) for glob in self.files for path in ROOT.glob(glob)}
        return sorted(path for path in found if not path.endswith(self.not_these or ("__init__.py",)))


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"property_tests/test_{name}.py" for name in names)


AREAS: dict[str, Area] = {
    "checkpoint": Area(
        ("moe_fn/checkpoint/*.py",),
        _tests("checkpoint", "checkpoint_sizes", "checkpoint_errors", "checkpoint_lora", "checkpoint_quantised", "checkpoint_families"),
    ),
    "quant": Area(("moe_fn/quant/*.py",), _tests("quant_numbers", "quant", "checkpoint_quantised", "quant_native")),
    "parallel": Area(
        ("moe_fn/parallel/*.py",),
        (*_tests("parallel", "bad_parallel", "expert_parallel", "batch_invariance_ranks"), "compile_tests/test_parallel_traffic.py"),
    ),
    "balance": Area(("moe_fn/balance/*.py",), _tests("eplb", "eplb_ranks", "layer")),
    "transformers": Area(
        ("moe_fn/integrations/transformers/*.py",),
        _tests(*(f"transformers_{name}" for name in ("laws", "register", "zoo", "models"))),
    ),
    "families": Area(("moe_fn/families/*.py",), _tests("transformers_zoo", "checkpoint_families", "transformers_models")),
    "triton": Area(
        ("moe_fn/kernels/triton/*.py",),
        _tests("triton_rows", "triton_top_k", "triton_products", "triton_layer", "triton_backward", "triton_quant"),
        mutants_of_lines,
        ("__init__.py", "ahead_of_time.py", "_cases.py", "_signatures.py", "_quant.py"),
    ),
    "native": Area(
        ("moe_fn/kernels/cpu/*.h", "moe_fn/kernels/cpu/*.cpp"),
        _tests("native", "quant_native", "batch_invariance"),
        mutants_of_lines,
        imported="moe_fn.kernels.native as n; assert n.active().problem is None",
    ),
}


def area_of(file: str) -> str:
    """The area of a file.

    >>> area_of("moe_fn/quant/tiles.py")
    'quant'
    """
    return next(name for name, area in AREAS.items() if file in area.paths)
