"""Adapters as PEFT saves them: in the documented layout, compared with peft where it is installed, and folders with
contradictory contents.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from support import law
from torch import Tensor

import moe_fn
from moe_fn import MoEConfig, QuantConfig
from moe_fn.testing import assert_matches, weights_for

pytest.importorskip("safetensors")
from safetensors.torch import save_file

from moe_fn.checkpoint import load_lora, peft

PREFIX = "model.layers.3.mlp"
Products = dict[str, dict[int, Tensor]]  # the update of a matrix, by part and expert


@dataclasses.dataclass(frozen=True)
class Saved:
    """The contents of a folder, and the update of each matrix by the adapter."""

    config: MoEConfig
    adapter_config: dict[str, Any]
    tensors: dict[str, Tensor]
    added: Products
    layout: Any = None
    weight_layout: Any = None  # argument of the caller


def write(folder: Path | str, adapter_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (Path(folder) / "adapter_config.json").write_text(json.dumps(adapter_config))
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, Path(folder) / "adapter_model.safetensors")


def sizes_of(config: MoEConfig) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    gated = config.activation != "relu2_no_mul"
    return {
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "gate_up": (hidden, 2 * inner if gated else inner),
        "down": (inner, hidden),
    }


@st.composite
def saved(draw: DrawFn, versions: tuple[str | None, ...] | None = None) -> Saved:
    """Draws an adapter. With `versions` it is one of parameters only, as these versions of peft write it."""
    gated = draw(st.booleans())
    config = MoEConfig(
        num_experts=draw(st.integers(1, 4)),
        top_k=1,
        hidden_size=draw(st.integers(2, 6)),
        intermediate_size=draw(st.integers(2, 5)),
        activation="silu" if gated else "relu2_no_mul",
        gate_up_layout=draw(st.sampled_from(["packed", "interleaved"])) if gated else "packed",
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rank, alpha, stabilised = draw(st.integers(1, 3)), draw(st.sampled_from([1.0, 8, 0.5])), draw(st.booleans())
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "bias": "none",
    }
    if versions is None and draw(st.booleans()):
        tensors, added, more = _modules(draw, config, gated, rank, alpha, stabilised, generator)
        return Saved(config, values | more, tensors, added)
    layout = draw(st.sampled_from([None, "packed", "interleaved"])) if gated else None
    tensors, added, more = _parameters(draw, config, gated, rank, alpha, stabilised, generator)
    values["peft_version"] = version = draw(st.sampled_from(versions or VERSIONS))
    interleaved = (layout or config.gate_up_layout) == "interleaved"
    # given, or left to the default
    weight_layout = draw(st.sampled_from(["out_in", "in_out"] if interleaved else ["out_in"]))
    given_layout = None if (weight_layout == "in_out") == interleaved and draw(st.booleans()) else weight_layout
    if (given_layout == "out_in") if version is None else is_of_outputs(version, weight_layout):
        tensors = exchanged(tensors, rank, config.num_experts)
    return Saved(config, values | more, tensors, added, layout, given_layout)


VERSIONS = (None, "0.18.0", "0.18.1", "0.19.0", "0.19.1", "0.20.0", "0.21.2", "0.22.1.dev0@0a1b2c", "1.0.0")


def is_of_outputs(version: str, weight_layout: str) -> bool:
    """Whether peft's ParamWrapper of this version takes the outputs of [E, m, n] for its inputs; a model with [E, in,
    out] has is_transposed.
    """
    inputs, outputs = ("out", "in") if weight_layout == "out_in" else ("in", "out")
    if version == "0.19.0":
        inputs, outputs = (outputs, inputs) if weight_layout == "in_out" else (inputs, outputs)
    elif not version.startswith("0.18"):
        inputs, outputs = (outputs, inputs) if weight_layout == "out_in" else (inputs, outputs)
    return inputs == "out"


def exchanged(tensors: dict[str, Tensor], rank: int, experts: int) -> dict[str, Tensor]:
    """Returns factors with the roles exchanged: A for the outputs [E r, out], B for the inputs [in, r E]."""
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            b = tensors[other].unflatten(1, (rank, experts))
            found[name] = b.permute(2, 1, 0).flatten(0, 1)
            found[other] = a.unflatten(0, (experts, rank)).permute(2, 1, 0).flatten(1)
    return found


def _modules(
    draw: DrawFn, config: MoEConfig, gated: bool, rank: int, alpha: float, stabilised: bool, generator: torch.Generator
) -> tuple[dict[str, Tensor], Products, dict[str, Any]]:
    names = draw(st.sampled_from([("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]))
    parts = dict(zip(("gate", "up", "down"), names, strict=True))
    if not gated:
        parts = {"up": "up_proj", "down": "down_proj"}
    parts = {part: parts[part] for part in draw(st.sets(st.sampled_from(sorted(parts)), min_size=1))}
    other = draw(st.integers(1, 4))
    pattern = {rf"experts.\d+.{next(iter(parts.values()))}": other} if draw(st.booleans()) else {}
    tensors, added = {}, {part: dict[int, Tensor]() for part in parts}
    for expert in draw(st.sets(st.integers(0, config.num_experts - 1), min_size=1)):
        for part, name in parts.items():
            own = other if pattern and part == next(iter(parts)) else rank
            size, out = sizes_of(config)[part]
            a, b = torch.randn(own, size, generator=generator), torch.randn(out, own, generator=generator)
            module = f"base_model.model.{PREFIX}.experts.{expert}.{name}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            added[part][expert] = b @ a * alpha / (math.sqrt(own) if stabilised else own)
    return tensors, added, {"rank_pattern": pattern}


def _parameters(
    draw: DrawFn, config: MoEConfig, gated: bool, rank: int, alpha: float, stabilised: bool, generator: torch.Generator
) -> tuple[dict[str, Tensor], Products, dict[str, Any]]:
    parts = draw(st.sampled_from([("gate_up", "down"), ("down",), ("gate_up",)]))
    names = {"gate_up": "gate_up_proj" if gated else "up_proj", "down": "down_proj"}
    alphas = {"mlp.experts.down_proj": 3.0, "mlp.experts.up_proj": 5.0} if draw(st.booleans()) else {}
    tensors, added, experts = {}, {}, config.num_experts
    for part in parts:
        size, out = sizes_of(config)[part]
        a, b = (
            torch.randn(rank * experts, size, generator=generator),
            torch.randn(out, rank * experts, generator=generator),
        )
        module = f"base_model.model.{PREFIX}.experts" + (".base_layer" if part == "gate_up" and len(parts) == 2 else "")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        factor = alphas.get(f"mlp.experts.{names[part]}", alpha) / (math.sqrt(rank) if stabilised else rank)
        every = torch.einsum("ore,eri->eoi", b.reshape(out, rank, experts), a.reshape(experts, rank, size)) * factor
        added[part] = dict(enumerate(every))
    return (
        tensors,
        added,
        {"alpha_pattern": alphas, "target_parameters": [f"mlp.experts.{names[part]}" for part in parts]},
    )


def matrix(problem: Saved, product: str, expert: int) -> Tensor:
    """Returns the update of a matrix of an expert, in the layout of the config."""
    config, (size, out) = problem.config, sizes_of(problem.config)[product]
    if product in problem.added or product == "down" or config.activation == "relu2_no_mul":
        part = product if product in problem.added or product == "down" else "up"
        found = problem.added.get(part, {}).get(expert, torch.zeros(out, size))
        layout = problem.layout or config.gate_up_layout
    else:
        halves = [problem.added.get(part, {}).get(expert, torch.zeros(out // 2, size)) for part in ("gate", "up")]
        found, layout = torch.cat(halves), "packed"
    if product == "gate_up" and layout != config.gate_up_layout:
        half = out // 2
        order = (
            [row // 2 + half * (row % 2) for row in range(out)]
            if layout == "packed"
            else [*range(0, out, 2), *range(1, out, 2)]
        )
        found = found[order]
    return found


def assert_adds(config: MoEConfig, lora: moe_fn.LoRAWeights, wanted: Callable[[str, int], Tensor]) -> None:
    for product in ("gate_up", "down"):
        a, b = getattr(lora, f"{product}_a"), getattr(lora, f"{product}_b")
        for expert in range(config.num_experts):
            expected = wanted(product, expert)
            assert_matches(
                torch.zeros_like(expected) if a is None else b[0, expert] @ a[0, expert], expected, scale=1.0
            )


@settings(max_examples=40)
@law(saved())
def test_an_adapter_of_peft_is_loaded_as_it_was_saved(problem: Saved) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, problem.adapter_config, problem.tensors)
        lora = load_lora(
            folder, PREFIX, problem.config, gate_up_layout=problem.layout, weight_layout=problem.weight_layout
        )
    assert_adds(problem.config, lora, lambda product, expert: matrix(problem, product, expert))
    config, weights = moe_fn.add_lora(problem.config, weights_for(problem.config), [lora])
    assert config.lora is not None and config.lora.experts == "each"
    moe_fn.moe_forward(config, weights, torch.zeros(2, config.hidden_size), torch.zeros(2, config.num_experts))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_of_every_version_of_peft(version: str | None) -> None:
    settings(max_examples=5)(given(saved((version,)))(test_an_adapter_of_peft_is_loaded_as_it_was_saved.check))()


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
QUANT = QuantConfig(scheme="int8", granularity="channel")
CONFIG = MoEConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=12)


@pytest.mark.parametrize("inner", [12, 8, 16])  # of hidden 16: gate_up of 8 has 16 inputs and outputs, down of 16 too
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",)], ids=str)
def test_a_model_of_peft_computes_what_the_loaded_adapter_does(
    family: str, targets: tuple[str, ...], inner: int, tmp_path: Path
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, intermediate_size=inner)
    of_qwen = {"moe_intermediate_size": inner, "num_experts": 4}
    more = of_qwen if family == "qwen3_moe" else {"num_local_experts": 4, "intermediate_size": inner}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            family, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            vocab_size=32,
            num_experts_per_tok=2, **more,
        )
    )  # fmt: skip
    lora_config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in targets],
        init_lora_weights=False,
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.down_proj": 7},
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, lora_config)
    adapted.save_pretrained(tmp_path)
    after = dict(adapted.merge_and_unload().named_parameters())
    interleaved = family == "gpt_oss"
    lora = load_lora(tmp_path, "model.layers.0.mlp", config, gate_up_layout="interleaved" if interleaved else None)

    def wanted(product: str, expert: int) -> Tensor:
        name = f"model.layers.0.mlp.experts.{product}_proj"
        difference = (after[name] - before[name])[expert].detach()
        if not interleaved:
            return difference
        return difference.T if product == "down" else torch.cat([difference.T[0::2], difference.T[1::2]])

    assert_adds(config, lora, wanted)


class Experts(torch.nn.Module):
    """Experts that are separate modules, as in models before transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate_proj": (16, 12), "up_proj": (16, 12), "down_proj": (12, 16)}
        each = (
            torch.nn.ModuleDict({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})
            for _ in range(4)
        )
        self.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(each)})


@pytest.mark.parametrize(
    "targets", [["gate_proj", "up_proj", "down_proj"], ["up_proj"], r".*experts\.[12]\.(gate|down)_proj"], ids=str
)
def test_modules_of_peft_are_what_the_loaded_adapter_adds(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Experts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False,
        rank_pattern={"experts.1.up_proj": 2},
                               alpha_pattern={"down_proj": 7})
    )  # fmt: skip
    adapted.save_pretrained(tmp_path)
    after = dict(adapted.merge_and_unload().named_parameters())
    lora = load_lora(tmp_path, "mlp", CONFIG)

    def wanted(product: str, expert: int) -> Tensor:
        names = [
            f"mlp.experts.{expert}.{part}_proj.weight" for part in (("down",) if product == "down" else ("gate", "up"))
        ]
        return torch.cat([(after[name] - before[name]).detach() for name in names])

    assert_adds(CONFIG, lora, wanted)


LAYER = "model.language_model.layers.3"  # Gemma-4's experts and router are in the same module as its attention
BESIDE = ("self_attn.q_proj", "mlp.gate_proj", "per_layer_input_gate")


@pytest.mark.parametrize("experts", ["experts", "moe.experts"])
def test_an_adapter_of_a_layers_own_experts_may_adapt_the_rest_of_it(experts: str, tmp_path: Path) -> None:
    others = {
        f"base_model.model.{LAYER}.{name}.lora_{side}.weight": torch.ones(2, 2) for name in BESIDE for side in "AB"
    }
    write(tmp_path, PLAIN, renamed(f"{PREFIX}.experts", f"{LAYER}.{experts}") | others)
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone", PLAIN, GOOD)
    found, alone = load_lora(tmp_path, LAYER, CONFIG), load_lora(tmp_path / "alone", PREFIX, CONFIG)
    assert found.down_a is not None and alone.down_a is not None and torch.equal(found.down_a, alone.down_a)
    for name in ("router.proj", "experts.gate", "shared_experts.up_proj"):
        write(tmp_path, PLAIN, renamed(PREFIX, LAYER) | {f"{LAYER}.{name}.lora_A.weight": torch.ones(2, 2)})
        with pytest.raises(
            ValueError, match=rf"has {LAYER}.{name}.lora_A.weight; expected only adapters of the block's experts"
        ):
            load_lora(tmp_path, LAYER, CONFIG)


def test_an_adapter_of_peft_for_gemma_4_that_adapts_attention_too(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {
        "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 12, "num_experts": 4, "top_k_experts": 2,
        "enable_moe_block": True, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 8, "vocab_size": 32, "vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 0,
        "layer_types": ["full_attention"],
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gemma4_text", **words))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    targets = {
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **targets))
    adapted.save_pretrained(tmp_path)
    after = dict(adapted.merge_and_unload().named_parameters())
    lora, where = load_lora(tmp_path, "model.layers.0", CONFIG), "model.layers.0.experts."
    assert_adds(
        CONFIG,
        lora,
        lambda product, expert: (after[f"{where}{product}_proj"] - before[f"{where}{product}_proj"])[expert].detach(),
    )


SQUARE = dataclasses.replace(CONFIG, intermediate_size=16)
OF_ALL = {f"{PREFIX}.experts.lora_A.weight": torch.ones(8, 16), f"{PREFIX}.experts.lora_B.weight": torch.ones(16, 8)}
UNCLEAR: dict[str, tuple[MoEConfig, str]] = {
    "packed [E, in, out], which may be a Llama-4": (dataclasses.replace(SQUARE, weight_layout="in_out"), "0.21.2"),
    "codes, whose floats may be in either layout": (dataclasses.replace(SQUARE, quant=QUANT), "0.18.1"),
    "between two releases": (SQUARE, "0.19.1.dev0"),
    "no version": (SQUARE, "main"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_sides_that_nothing_tells_are_refused_in_words(case: str, tmp_path: Path) -> None:
    config, version = UNCLEAR[case]
    write(tmp_path, PLAIN | {"target_parameters": ["experts.down_proj"], "peft_version": version}, OF_ALL)
    with pytest.raises(
        ValueError, match=r"experts.down_proj has as many inputs as outputs, .* expected the model's weight_layout="
    ):
        load_lora(tmp_path, PREFIX, config)


def test_an_adapter_of_an_older_peft_is_turned_over(tmp_path: Path) -> None:
    a, b = torch.randn(8, 16), torch.randn(12, 8)  # of down [4, 16, 12]: until 0.18 the dims are in their order
    tensors = {f"{PREFIX}.experts.lora_A.weight": a, f"{PREFIX}.experts.lora_B.weight": b}
    write(tmp_path, PLAIN | {"target_parameters": ["experts.down_proj"]}, tensors)
    delta = torch.einsum("ore,eri->eio", b.reshape(12, 2, 4), a.reshape(4, 2, 16)) * 2
    found = load_lora(tmp_path, PREFIX, CONFIG)
    assert_adds(CONFIG, found, lambda product, expert: delta[expert] if product == "down" else torch.zeros(24, 16))


def test_dtype_and_device_are_as_asked(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, {name: t.to(torch.bfloat16) for name, t in GOOD.items()})
    kept, wide = (load_lora(tmp_path, PREFIX, CONFIG, dtype=dtype) for dtype in (None, torch.float64))
    assert kept.down_a is not None and kept.down_a.dtype == torch.bfloat16
    assert wide.down_b is not None and wide.down_b.dtype == torch.float64 and wide.down_b.shape == (1, 4, 16, 2)
    write(tmp_path, PLAIN | {"lora_alpha": 0.2}, {name: t.to(torch.bfloat16) for name, t in GOOD.items()})
    scaled = load_lora(tmp_path, PREFIX, CONFIG, dtype=torch.float32)
    # not rounded to bfloat16, the dtype of the file
    assert scaled.down_b is not None and scaled.down_b[0, 1, 0, 0].item() == torch.tensor(0.1).item()


def test_rows_of_a_factor_change_their_order_and_back() -> None:
    packed, alternating = (
        torch.tensor(rows, dtype=torch.float32).view(1, 6, 1) for rows in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5])
    )
    for found, wanted, before, after in (
        ("packed", "interleaved", packed, alternating),
        ("interleaved", "packed", alternating, packed),
        ("packed", "packed", packed, packed),
    ):
        assert torch.equal(peft._in_layout(before, found, wanted), after)


GOOD = {
    f"{PREFIX}.experts.1.down_proj.lora_A.weight": torch.ones(2, 12),
    f"{PREFIX}.experts.1.down_proj.lora_B.weight": torch.ones(16, 2),
}


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): t for name, t in GOOD.items()}


FOLDERS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "peft_type is 'LOHA'": (PLAIN | {"peft_type": "LOHA"}, GOOD),
    "peft_type is None": ({}, GOOD),
    "use_dora is True": (PLAIN | {"use_dora": True}, GOOD),
    "lora_bias is True": (PLAIN | {"lora_bias": True}, GOOD),
    "bias is 'all'": (PLAIN | {"bias": "all"}, GOOD),
    "init_lora_weights is 'pissa'": (PLAIN | {"init_lora_weights": "pissa"}, GOOD),
    "init_lora_weights is \\[\\]": (PLAIN | {"init_lora_weights": []}, GOOD),
    "r is None": ({"peft_type": "LORA", "lora_alpha": 4}, GOOD),
    "r is -1": (PLAIN | {"r": -1}, GOOD),
    "lora_alpha is inf": (PLAIN | {"lora_alpha": float("inf")}, GOOD),
    "lora_alpha is 1000": (PLAIN | {"lora_alpha": 10**400}, GOOD),
    "use_rslora is 3": (PLAIN | {"use_rslora": 3}, GOOD),
    "peft_version is 18": (PLAIN | {"peft_version": 18}, GOOD),
    "target_parameters is 'x'": (PLAIN | {"target_parameters": "x"}, GOOD),
    "rank_pattern is \\[3\\]": (PLAIN | {"rank_pattern": [3]}, GOOD),
    "rank_pattern has the pattern '\\(a\\+\\)\\+'": (PLAIN | {"rank_pattern": {"(a+)+": 2}}, GOOD),
    "rank_pattern has the pattern '\\*'": (PLAIN | {"rank_pattern": {"*": 2}}, GOOD),
    "alpha_pattern is 'x'": (PLAIN | {"alpha_pattern": {"a": "x"}}, GOOD),
    "holds a list": ([], GOOD),
    "no adapter below": (PLAIN, renamed(PREFIX, "model.layers.4.mlp")),
    "has only .*lora_A.weight; expected both": (PLAIN, dict(list(GOOD.items())[:1])),
    "has model.layers.3.mlp.gate.lora_A.weight; expected only": (
        PLAIN,
        GOOD | {f"{PREFIX}.gate.lora_A.weight": torch.ones(2, 2)},
    ),
    "experts 0..3": (PLAIN, renamed("experts.1", "experts.4")),
    "are \\[2, 12\\] and \\[16, 2\\]; expected \\[2, 16\\] and \\[12, 2\\]": (PLAIN, renamed("down_proj", "up_proj")),
    "are \\[2, 12\\] and \\[16, 2\\]; expected \\[3, 12\\] and \\[16, 3\\]": (PLAIN | {"r": 3}, GOOD),
    "is I64 \\[2, 12\\]": (PLAIN, {name: t.to(torch.int64) for name, t in GOOD.items()}),
    "is F32 \\[2, 12, 1\\]": (PLAIN, {name: t.unsqueeze(2) for name, t in GOOD.items()}),
    "expected one of the two forms": (PLAIN, GOOD | renamed("experts.1.down_proj", "experts")),
    "expected target_parameters to name one": (PLAIN, renamed("experts.1.down_proj", "experts")),
    "are \\[2, 12\\] and \\[16, 2\\]; expected \\[8, 12\\] and \\[16, 8\\] of down_proj": (
        PLAIN | {"target_parameters": ["mlp.experts.down_proj"]},
        renamed("experts.1.down_proj", "experts"),
    ),
    "has two adapters; expected adapters of gate and up": (PLAIN, GOOD | renamed("down_proj", "w2")),
}


@pytest.mark.parametrize("words", FOLDERS)
def test_folders_that_do_not_fit_are_refused_in_words(words: str, tmp_path: Path) -> None:
    write(tmp_path, *FOLDERS[words])
    with pytest.raises(ValueError, match=words):
        load_lora(tmp_path, PREFIX, CONFIG)


def test_what_is_no_folder_of_peft_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_lora(tmp_path, PREFIX, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_lora(tmp_path, PREFIX, CONFIG)
    write(tmp_path, PLAIN, GOOD)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="expected"):
        load_lora(tmp_path, PREFIX, CONFIG)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        load_lora(tmp_path, PREFIX, CONFIG)
