"""Whole models of transformers, tiny and random, with replaced blocks: logits, tokens and configs are the same."""

import json
import re
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from moe_fn.families import config_of_layer
from moe_fn.integrations.transformers import replace_moe_blocks
from moe_fn.testing.matching import relative_rms
from shared_tests.transformers_models import MODELS, make_model, make_token_ids

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_has_the_same_logits_and_tokens(name: str) -> None:
    model, ids = make_model(name, 1), make_token_ids(2)
    with torch.no_grad():
        logits, tokens = model(ids).logits, generated(model, ids)
        report = replace_moe_blocks(model)
        assert report.replaced, report
        assert relative_rms(model(ids).logits, logits) <= TOLERANCE
        assert torch.equal(generated(model, ids), tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_file_says_what_the_blocks_say(name: str) -> None:
    """The keys of config.json, and the attributes and tensors of modules, give the same MoEConfig."""
    model = make_model(name, 1)
    words = json.loads(model.config.to_json_string())
    replaced = replace_moe_blocks(model).replaced
    assert replaced
    for block in replaced:
        layer = re.search(r"(?:layers|blocks)\.(\d+)(?:\.|$)", block.name)
        assert layer is not None, block.name
        assert config_of_layer(words, int(layer.group(1))) == block.config, block.name


WITH_ROUTER_LOGITS = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "jamba",
    "ernie4_5_moe",
    "granitemoe",
    "phimoe",
    "dbrx",
    "olmoe",
)


@pytest.mark.parametrize("name", WITH_ROUTER_LOGITS)
def test_router_logits_are_recorded_as_before(name: str) -> None:
    model, ids = make_model(name, 1), make_token_ids(2)
    with torch.no_grad():
        before = model(ids, output_router_logits=True)
        replace_moe_blocks(model)
        after = model(ids, output_router_logits=True)
    assert len(after.router_logits) == len(before.router_logits) > 0
    for ours, theirs in zip(after.router_logits, before.router_logits, strict=True):
        assert ours.shape == theirs.shape and relative_rms(ours, theirs) <= TOLERANCE
    if before.aux_loss is not None and not isinstance(before.aux_loss, int):
        assert relative_rms(after.aux_loss, before.aux_loss) <= TOLERANCE


def generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return tokens
