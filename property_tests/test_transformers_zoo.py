"""Tests of the zoo, the oracle of the integration's tests: blocks are as their rows say, every tensor changes the
output, and no family is missing.
"""

import ast
import copy
import dataclasses
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from shared_tests.transformers_models import MODELS, make_model, make_token_ids  # noqa: E402
from shared_tests.zoo import ROWS, TOKEN_CHOICE, BlockResult, BlockRow, make_block, make_config, make_input, run_block  # noqa: E402
from shared_tests.zoo.params import each_row  # noqa: E402

ALL, CHOOSING = each_row(ROWS), each_row(TOKEN_CHOICE)
# Keys that a config class reads in addition to its fields: older names, and an option that is read with `getattr`
EXTRA_WORDS = {
    ("longcat_flash", "router_bias"),
    ("dots3_note", "pyramid_num_routed"),
    ("qwen3_omni_moe", "shared_expert_intermediate_size"),
}


@functools.cache
def ran(row: BlockRow, seed: int = 0) -> tuple[Any, torch.Tensor, BlockResult]:
    block = make_block(row, seed)
    x = make_input(row, seed + 1)
    with torch.no_grad():
        return block, x, run_block(row, block, x)


def parts_of(row: BlockRow, block: Any) -> dict[str, torch.Tensor]:
    """Returns tensors of the block that its Mixture-of-Experts output may depend on: in a gemma4 layer,
    without attention and the dense MLP.
    """
    tensors = dict(itertools.chain(block.named_parameters(), block.named_buffers()))
    if row.takes == "gemma_layer":
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(("router.", "experts.", "pre_feedforward_layernorm_2."))
        }
    return tensors


@ALL
def test_a_row_builds_and_runs(row: BlockRow) -> None:
    block, x, result = ran(row)
    assert not block.training
    assert {name for name, _ in block.named_buffers()} <= set(block.state_dict()), (
        "a buffer that is not saved must not be random"
    )
    assert all(tensor.dtype == torch.float32 for tensor in block.state_dict().values() if tensor.is_floating_point())
    assert result.y.shape == x.shape and result.y.dtype == torch.float32
    assert result.y.isfinite().all() and result.y.std() > 1e-3
    assert torch.equal(x, make_input(row, 1)), "the input was changed in place"


@CHOOSING
def test_a_router_gives_ids_and_weights(row: BlockRow) -> None:
    _, x, result = ran(row)
    assert result.expert_ids is not None and result.weights is not None
    assert result.expert_ids.shape == result.weights.shape and len(result.expert_ids) == x[..., 0].numel()
    assert result.expert_ids.dtype == torch.int64 and result.weights.dtype == torch.float32
    assert (
        (result.weights >= 0).all()
        and result.weights.isfinite().all()
        and (result.weights > 0).any(dim=-1).float().mean() > 0.5
    )
    for ids in result.expert_ids:
        assert ids.unique().numel() == ids.numel(), "a token chose an expert twice"
    assert result.expert_ids.unique().numel() >= 4, "too few experts are used"


@ALL
def test_a_seed_decides_every_number(row: BlockRow) -> None:
    block, x, result = ran(row)
    torch.manual_seed(99)
    again = make_block(row, 0)
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(run_block(row, again, x).y, result.y)
        other = make_block(row, 1)
        assert not torch.equal(run_block(row, other, x).y, result.y)
    for (name, a), b in zip(block.state_dict().items(), other.state_dict().values(), strict=True):
        assert not torch.equal(a, b), f"{name} does not depend on the seed"


@CHOOSING
def test_every_tensor_of_a_block_matters(row: BlockRow) -> None:
    block, x, result = ran(row)
    block = copy.deepcopy(block)
    for name, tensor in parts_of(row, block).items():
        if row.idle and name.startswith(row.idle):
            continue
        before = tensor.clone()
        with torch.no_grad():
            tensor.copy_(
                before.flip(-1)
                if not tensor.is_floating_point()
                else before + 0.5 * torch.randn(before.shape).to(before)
            )
            assert not torch.equal(run_block(row, block, x).y, result.y), f"{name} does not change the output"
            tensor.copy_(before)


def experts_of(row: BlockRow, block: Any) -> dict[str, torch.Tensor]:
    """Returns views [experts, ...] of the tensors with one slice for each expert."""
    found = {}
    for name, tensor in block.named_parameters():
        if row.routing == "jetmoe" and re.match(r"(in|out)put_linear\.", name):
            found[name] = tensor
        elif row.family == "dbrx" and name.startswith("experts."):
            found[name] = tensor.view(8, -1, tensor.shape[-1])
        elif re.search(r"(^|\.)experts\.\w+_proj(_bias)?$", name):
            found[name] = tensor
    return found


@CHOOSING
def test_an_expert_matters_to_the_tokens_that_chose_it_and_to_no_other(row: BlockRow) -> None:
    block, x, result = ran(row)
    block = copy.deepcopy(block)
    tensors = experts_of(row, block)
    assert len(tensors) >= 2
    banks = {"text_moe": 0, "vision_moe": 1}
    for name, tensor in tensors.items():
        for expert in range(len(tensor)):
            chose = ((result.expert_ids == expert) & (result.weights > 0)).any(dim=-1)
            if row.routing == "two_banks":
                chose &= result.modality.flatten() == banks[name.partition(".")[0]]
            if name.startswith(row.idle or " ") or (row.family == "longcat_flash" and expert >= 8):
                # zero experts have gate and up weights in the checkpoint, but do not use them
                chose = torch.zeros_like(chose)
            before = tensor[expert].clone()
            with torch.no_grad():
                tensor[expert] += 0.5
                changed = (run_block(row, block, x).y != result.y).flatten(0, 1).any(dim=-1)
                tensor[expert] = before
            assert torch.equal(changed, chose), f"{name}[{expert}]"


PAIRS = [
    (a, b)
    for a, b in itertools.combinations(ROWS, 2)
    if (a.family, a.block, a.path, a.takes, a.args) == (b.family, b.block, b.path, b.takes, b.args)
    and a.sizes == b.sizes
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1].variant}")
def test_the_options_of_a_variant_show_in_its_output(pair: tuple[BlockRow, BlockRow]) -> None:
    """Rows with equal tensors and different options have different outputs, unless a row says that they are
    the same.
    """
    one, other = (ran(row)[2].y for row in pair)
    distance = (one - other).norm() / one.norm()
    if pair[0].same_numbers_as == pair[1].variant or pair[1].same_numbers_as == pair[0].variant:
        assert distance < 1e-6
    else:
        assert distance > 1e-2


@ALL
def test_a_row_speaks_its_configs_words(row: BlockRow) -> None:
    """A config class would store an unknown key and never read it."""
    config = type(make_config(row))
    words = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    unknown = {
        word for word in (*row.sizes, *row.options) if word not in words and (row.family, word) not in EXTRA_WORDS
    }
    assert not unknown


@functools.cache
def classes_in_sources() -> dict[tuple[str, str], bool]:
    """Returns (family, class) of every class in modeling files that is an MoE class by its name or decorator; True if
    decorated.
    """
    found = {}
    by_name = re.compile(
        r"(Experts|ParallelExperts|SparseMLP|SparseMoeBlock|SparseMoEBlock|MoE|Moe|CDMoE|MoA|MoELayer|NaiveMoe)$"
    )
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        for node in ast.parse(text).body if re.search("[Ee]xperts|Moe|MoE|MoA", text) else ():
            if isinstance(node, ast.ClassDef):
                decorated = any(
                    "use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list
                )
                if decorated or by_name.search(node.name):
                    found[path.parent.name, node.name] = decorated
    return found


def test_every_family_of_transformers_is_met() -> None:
    sources = classes_in_sources()
    met = {(row.family, type(module).__name__) for row in ROWS for module in ran(row)[0].modules()}
    missing = set(sources) - met
    assert not missing, f"no row has {sorted(missing)}"
    if transformers.__version__.startswith("5.23."):
        assert sum(sources.values()) == 65 and len({family for family, _ in sources}) == 73
    assert {row.family for row in ROWS} == {family for family, _ in sources}


def test_rows_are_told_apart_and_say_where_they_stand() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.table for row in ROWS} == set("ABCDE")
    assert {row.family for row in ROWS if row.refused} == {
        "jetmoe",
        "switch_transformers",
        "nllb_moe",
        "doge",
        "vitpose_backbone",
    }
    assert all(row.same_numbers_as in {"", *(r.variant for r in ROWS if r.family == row.family)} for row in ROWS)


GEMMAS = pytest.mark.parametrize("row", [row for row in ROWS if row.takes == "gemma_layer"], ids=lambda row: row.name)


class _NoAttention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return hidden_states, None


@GEMMAS
def test_the_branch_of_a_gemma_layer_is_what_its_forward_computes(row: BlockRow) -> None:
    """In the layer's forward without attention, x is the input of the router, and y the input of the norm after the
    experts.
    """
    layer = make_block(row, 0)
    layer.self_attn = _NoAttention()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("router", "experts", "post_feedforward_layernorm_2"):
        layer.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    with torch.no_grad():
        layer(make_input(row, 1))
        theirs = dict(seen)
        x = theirs["router"][0].view(2, 11, -1)
        ours = run_block(row, layer, x)
    assert torch.equal(ours.y, theirs["post_feedforward_layernorm_2"][0])
    assert torch.equal(ours.after_norm, theirs["post_feedforward_layernorm_2"][1])
    assert torch.equal(ours.experts_input.flatten(0, 1), theirs["experts"][0])
    assert torch.equal(ours.expert_ids, theirs["router"][1][2]) and torch.equal(ours.weights, theirs["router"][1][1])


WHOLE = pytest.mark.parametrize("name", MODELS)


@WHOLE
def test_a_model_runs_and_repeats(name: str) -> None:
    token_ids = make_token_ids(0)
    with torch.no_grad():
        logits = make_model(name, 0)(token_ids).logits
        again = make_model(name, 0, "grouped_mm" if MODELS[name].registered else "eager")
        other = make_model(name, 1)(token_ids).logits
        assert logits.shape == (2, 5, 128) and logits.isfinite().all() and logits.std() > 1e-2
        assert torch.allclose(again(token_ids).logits, logits, atol=1e-4 * float(logits.std()))
        assert (other - logits).norm() > 0.1 * logits.norm()
        tokens = again.generate(token_ids, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9) and torch.equal(tokens[:, :5], token_ids)


def test_models_speak_their_configs_words_and_hold_experts() -> None:
    for name, row in MODELS.items():
        model = make_model(name, 0)
        words = {field.name for field in dataclasses.fields(model.config)} | set(model.config.attribute_map)
        assert set(row.arguments) <= words, f"{name} has no keys {set(row.arguments) - words}"
        modules = {type(module).__name__ for module in model.modules()}
        assert any(row.block in modules for row in TOKEN_CHOICE if row.family == name), (
            f"{name} has no Mixture of Experts"
        )
        assert row.registered == any(
            is_decorated for (family, _), is_decorated in classes_in_sources().items() if family == name
        )
