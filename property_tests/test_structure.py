"""Rules of the repository: order of imports, tests of laws, the public API, sizes of files and functions, language."""

import ast
import dataclasses
import graphlib
import importlib.util
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from planted.ranks import RANK_BUGS
from test_planted_bugs import LAWS

import moe_fn
from moe_fn.families import FAMILIES
from moe_fn.families.find import PARTS
from shared_tests.sources import without_docstrings

PACKAGE = Path(moe_fn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
CAMPAIGN = sorted((Path(__file__).parent / "campaign").rglob("*.py"))

# Imports are downwards only: a module may import modules of lower numbers; stages never import each other.
LAYERS = (
    ("numerics", "torch_compat"),
    ("checks",),
    ("config",),
    ("records",),
    ("quant",),
    ("kernels",),
    ("backends",),
    ("ops", "weights"),
    ("stages",),
    ("balance", "fused"),
    ("parallel",),
    ("layer",),
    ("forward",),
    ("families",),
    ("bench", "integrations", "checkpoint"),
    ("",),  # the package itself re-exports
)
# Modules that run on the host between steps, and read values there: other modules must leave values on the device.
ON_HOST = ("balance/packing.py", "balance/slots.py", "parallel/sizes.py")  # the last one has sizes that are data
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix("__init__")


def imports_of(path: Path) -> list[str]:
    """Returns names of the moe_fn modules that a file imports, as "part" or "part.module"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_fn":
            found.append((node.module or "").partition(".")[2])
        elif isinstance(node, ast.Import):
            found += [alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "moe_fn"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_downwards_only(path: Path) -> None:
    part = part_of(path)
    for module in imports_of(path):
        other = module.split(".")[0]
        if part == "reference":
            assert other in ("reference", "config", "records"), (
                f"the reference imports moe_fn.{module}, which is compared with it"
            )
        elif part == "testing":
            # Random weights take their sizes from the table of weights, as the check of a call does: the reference and
            # the kernels compute with sizes of the config, so that a wrong size fails there. Which weights there are
            # testing decides itself.
            allowed = other in ("testing", "reference", "config", "records", "torch_compat")
            assert allowed or module == "weights.spec", f"testing imports moe_fn.{module}"
        elif part == "bench":
            assert other != "testing", f"{path.name} imports moe_fn.{module}"
        elif part == "stages":
            assert other != "stages" or module.split(".")[1].startswith("_"), (
                f"{path.name} imports another stage, moe_fn.{module}"
            )
            assert other == "stages" or LEVEL[other] < LEVEL["stages"], f"{path.name} imports upwards: moe_fn.{module}"
        else:
            assert other == part or LEVEL[other] < LEVEL[part], f"{path.name} imports upwards: moe_fn.{module}"


def name_of(path: Path) -> str:
    """Returns the module name of a file, relative to the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def modules_imported_by(path: Path) -> set[str]:
    """Returns modules of the package that a file imports; `from a import b` is a.b where b is a module."""
    modules, found = {name_of(other) for other in SOURCES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_fn":
            folder = (node.module or "").partition(".")[2]
            for alias in node.names:
                module = f"{folder}.{alias.name}".strip(".")
                found.add(module if module in modules else folder)
    return found - {name_of(path)}


def test_no_import_closes_a_circle_and_folders_stand_on_few_storeys() -> None:
    imports = {name_of(path): modules_imported_by(path) for path in SOURCES}
    order = list(graphlib.TopologicalSorter(imports).static_order())  # CycleError names the modules of a cycle
    part = {module: module.split(".")[0] for module in order}
    parts: dict[str, set[str]] = {}
    for module, others in imports.items():
        parts.setdefault(part[module], set()).update({part[other] for other in others} - {part[module]})
    storey: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(parts).static_order():
        storey[name] = 1 + max((storey[other] for other in parts[name]), default=0)
    assert max(storey.values()) <= 14, storey


def first_names_imported_by(path: Path) -> set[str]:
    """Returns the first name of every absolute import of a file: "torch" for `import torch.fx`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_property_tests_and_compile_tests_do_not_import_each_other() -> None:
    """Helpers of both are in shared_tests, which imports neither. property_tests is itself on the path."""
    folders = {name: PACKAGE.parent / name for name in ("property_tests", "compile_tests", "shared_tests")}
    if not all(folder.is_dir() for folder in folders.values()):
        pytest.skip("installed without the repository")
    own = {path.stem for path in folders["property_tests"].iterdir() if path.suffix == ".py" or path.is_dir()}
    forbidden = {
        "property_tests": {"compile_tests"},
        "compile_tests": {"property_tests", *own},
        "shared_tests": {"property_tests", "compile_tests", *own},
    }
    found = [
        f"{path.relative_to(PACKAGE.parent)} imports {name}"
        for folder, names in forbidden.items()
        for path in sorted(folders[folder].rglob("*.py"))
        for name in sorted(first_names_imported_by(path) & names)
    ]
    assert found == []


def test_few_files_stand_outside_of_folders() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_ops_talk_to_torch_library_and_only_kernels_to_triton(path: Path) -> None:
    text = path.read_text()
    code = "\n".join(line for line in ast.unparse(without_docstrings(ast.parse(text))).splitlines())
    assert "torch.library." not in code or part_of(path) == "ops"
    assert not re.search(r"^\s*(import|from) triton", code, re.MULTILINE) or part_of(path) == "kernels"
    assert "os.environ" not in code
    assert not re.search(r"\.(item|tolist|nonzero)\(", code) or (
        # a launch must not wait for the device
        (part_of(path) in ("kernels", "reference", "testing") and path.parent.name != "triton")
        or path.relative_to(PACKAGE).as_posix() in ON_HOST
    )


# Ops of a back-end are made of rules in ops/ and of the stages that they replace.
_OPS = ("ops/", "fused/", "layer/opaque.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ops_are_defined_in_three_places_and_stages_import_no_kernels(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, ast.Name | ast.Attribute)]
    defines = any(name.startswith("define_") for name in names)
    assert not defines or path.relative_to(PACKAGE).as_posix().startswith(_OPS)
    assert part_of(path) != "stages" or not any(module.startswith("kernels") for module in imports_of(path))


# Modules that may use private names of torch. testing/ inspects the compiler, bench/ calls products of other packages.
PRIVATE = ("torch_compat.py", "ops/define.py", "testing/graphs.py", "testing/graph_nodes.py", "bench/")
_PRIVATE_NAME = re.compile(r"\btorch(?:\.\w+)*\._(?!_|check\b|pytree\b)\w+|distributed_c10d|forward_ad\._")
# ops, by their schemas' names
_FUNCTIONAL_COLLECTIVES = ("torch.distributed._functional_collectives", "torch.ops._c10d_functional")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stand_in_one_place(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix().startswith(PRIVATE):
        return
    code = ast.unparse(without_docstrings(ast.parse(path.read_text())))
    assert not set(_PRIVATE_NAME.findall(code)) - set(_FUNCTIONAL_COLLECTIVES)


def laws_in_docstrings() -> set[str]:
    """Returns every sentence under "Laws" in a docstring as the name of a test."""
    found = set()
    needs = {"integrations": "transformers", "families": "transformers", "checkpoint": "safetensors"}
    for path in (*SOURCES, *CAMPAIGN):
        needed = None if path in CAMPAIGN else needs.get(part_of(path))
        if needed is not None and importlib.util.find_spec(needed) is None:
            continue  # their tests cannot run
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                continue
            block = re.search(r"^Laws\n((?:    .+\n?)+)", ast.get_docstring(node) or "", re.MULTILINE)
            for line in block.group(1).splitlines() if block else ():
                found.add(re.sub(r"[^a-z0-9_]+", "_", line.strip().rstrip(".").lower()))
    return found


def test_every_law_has_its_test_and_every_test_its_law() -> None:
    assert laws_in_docstrings() == set(LAWS) | {bug.law for bug in RANK_BUGS}


# Files of rows that may have more than 400 lines, and why. They define no function and no class.
TABLES = {
    "families/softmax.py": "a row has all that is known of a family: keys, defaults, live block, names in files",
    "families/sigmoid.py": "a row has all that is known of a family: keys, defaults, live block, names in files",
}


# Files of fewer than 40 lines, and why each is not a part of another file.
SHORT = {
    "bench/clock.py": "what the clocks of a CPU and of a GPU have in common",
    "bench/contestants/scatter_moe.py": "one contestant a file",
    "checkpoint/progress.py": "loading and the benchmark show progress in one way",
    "integrations/torchtitan/overrides.py": "a module that torchtitan imports by name",
    "kernels/native/call.py": "ops import it, and not what builds and loads the library",
    "kernels/torch/support.py": "one support.py a back-end",
    "kernels/triton/call.py": "ops import it, and not Triton",
    "numerics.py": "every folder above the config needs it",
    "ops/dense.py": "gates, shared experts and latent spaces need it, grouped products do not",
    "parallel/sizes.py": "all host syncs of the layer",
    "quant/calibration.py": "a record of calibrate, below the layer, that quantize_weights reads",
    "stages/reduce_and_trunc.py": "one stage a file",
}


def test_short_files_have_a_reason() -> None:
    short = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if len(path.read_text().splitlines()) < 40 and not path.name.startswith("__")
    }
    assert short == set(SHORT)


def test_files_and_functions_stay_small() -> None:
    for path in SOURCES:
        text, is_table = path.read_text(), path.relative_to(PACKAGE).as_posix() in TABLES
        defined = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert len(text.splitlines()) <= 400 or is_table, f"{path.name} has more than 400 lines"
        assert not (is_table and defined), f"{path.name} is a table and defines {defined}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                lines = (node.end_lineno or 0) - node.lineno - docstring
                assert lines <= 65, f"{path.name}: {node.name} has {lines} lines"


# Other files that may have a name of a family, and its meaning there.
NAMES_OF_FAMILIES = {
    "bench/models.py": "sizes of a benchmark",
    "families/tensor_names.py": "a layout of several families",
}


def test_names_of_families_are_in_their_rows_only() -> None:
    """A family is one row: no other module of the package has its model_type or the class of its block."""
    names = {name for family in FAMILIES for name in (*family.names, *family.blocks)} | set(PARTS)
    allowed = {*NAMES_OF_FAMILIES, *(f"families/{name}.py" for name in ("softmax", "sigmoid", "others"))}
    found = {
        (path.name, node.value)
        for path in SOURCES
        if path.relative_to(PACKAGE).as_posix() not in allowed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }
    assert found == set()


def test_the_public_surface_grows_on_purpose_only() -> None:
    assert sorted(moe_fn.__all__) == moe_fn.__all__
    assert all(getattr(getattr(moe_fn, name), "__doc__", None) for name in moe_fn.__all__)
    assert [f.name for f in dataclasses.fields(moe_fn.MoEConfig)] == [
        "num_experts", "top_k", "hidden_size", "intermediate_size", "router", "activation", "gate_up_layout",
        "weight_layout",
        "expert_norm", "shared", "latent", "zero_experts", "norms", "quant", "lora", "parallel", "hidden_padding",
        "chunk_tokens",
        "recompute", "batch_invariant", "backend", "opaque",
    ]  # fmt: skip


def functions_in(text: str) -> dict[str, str]:
    """Returns the code of each function by name, without docstrings and comments."""
    tree = without_docstrings(ast.parse(text))
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_on_architecture_shows_the_layer_as_it_is() -> None:
    page = _page("docs/architecture.md")
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    shown = {name: code for block in blocks for name, code in functions_in(block).items()}
    source = {
        name: code
        for file in ("layer/compose.py", "fused/routed_experts.py", "forward.py")
        for name, code in functions_in((PACKAGE / file).read_text()).items()
    }
    assert {"moe_forward", "_layer", "routed_and_shared", "dispatch_experts_combine"} <= set(shown)
    for name in set(shown) & set(source):
        assert shown[name] == source[name], f"docs/architecture.md and source of {name} differ"


def test_there_is_one_picture_of_the_layer() -> None:
    pictures = [re.search(r"^x \[T, H\] .*?y \[T, H\][^\n]*$", text, re.DOTALL | re.MULTILINE) for text in (
        _page("README.md").read_text(), _page("docs/architecture.md").read_text(), moe_fn.stages.__doc__ or ""
    )]  # fmt: skip
    assert len({picture and picture.group() for picture in pictures}) == 1


def test_the_readme_is_short_and_links_every_page() -> None:
    text = _page("README.md").read_text()
    assert len(text.splitlines()) <= 160
    missing = [
        page.name for page in sorted((PACKAGE.parent / "docs").glob("*.md")) if f"](docs/{page.name})" not in text
    ]
    assert missing == [], f"README.md has no link to {missing}"


def _page(name: str) -> Path:
    page = PACKAGE.parent / name
    if not page.exists():
        pytest.skip("installed without the repository")
    return page


# Docstrings, comments and messages are in plain English of the field: these words mark another dialect.
_DIALECT = re.compile(r"\b(whoever|nobody|lies|laid(?! out)|told|words of|beside it)\b", re.IGNORECASE)
_TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
# Terms of the field that the first sentence of a module may use instead of one of the glossary.
_FIELD_TERMS = (
    "accumulation", "activation", "adapter", "argument", "back-end", "bandwidth", "benchmark", "checkpoint", "code",
    "config", "contestant", "CPU", "device", "dtype", "elementwise", "floating-point", "gate", "gradient", "graph",
    "kernel", "layer", "logit", "loss", "matrix", "measurement", "module", "norm", "op", "PEFT", "plug-in", "product",
    "quantization", "quantized", "router", "routing", "safetensors", "shape", "stage", "tensor", "torch", "weight",
)  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_avoids_the_words_of_the_dialect(path: Path) -> None:
    with path.open("rb") as file:
        texts = [(t.start[0], t.string) for t in tokenize.tokenize(file.readline) if t.type in _TEXT_TOKENS]
    found = [(line, word) for line, text in texts for word in _DIALECT.findall(re.sub(r"\s+", " ", text))]
    assert found == [], f"{path.name}: (line, word) {found}; expected other words"


def test_tests_avoid_the_words_of_the_dialect() -> None:
    folders = (PACKAGE.parent / name for name in ("property_tests", "compile_tests", "shared_tests"))
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py")) if path != Path(__file__)]
    texts = ((path.name, re.sub(r"\s+", " ", path.read_text())) for path in paths)
    found = [(name, word) for name, text in texts for word in _DIALECT.findall(text)]
    assert found == [], f"(file, word) {found}; expected other words"


def glossary() -> list[str]:
    section = _page("docs/architecture.md").read_text().partition("## Glossary")[2].partition("\n## ")[0]
    return re.findall(r"^\| (\w+) \|", section, re.MULTILINE)[1:]  # without the header


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_first_sentence_of_a_module_uses_a_term_of_the_field(path: Path) -> None:
    terms = (*glossary(), *_FIELD_TERMS)
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = re.split(r"\.\s|\n\n", docstring)[0]
    assert re.search(rf"\b({'|'.join(terms)})(e?s)?\b", first, re.IGNORECASE), f"{path.name}: {first!r}"


def test_importing_does_not_import_the_compiler_or_the_benchmark() -> None:
    code = "import sys, moe_fn; sys.exit(bool({'torch._dynamo', 'moe_fn.bench'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0, "the compiler takes 1.7 s"
