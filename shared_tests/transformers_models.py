"""Whole models of transformers, tiny and random, made from the zoo's rows."""

import importlib
from typing import Any

import torch

from shared_tests.zoo import randomise
from shared_tests.zoo.models import MODELS, ModelRow

__all__ = ["MODELS", "ModelRow", "make_model", "make_token_ids"]


def make_model(name: str, seed: int, experts_implementation: str = "eager", layers: int | None = None) -> Any:
    """Returns the model of a row in float32 and eval mode, with random parameters and saved buffers; equal seeds give
    equal values.

    layers: number of layers, instead of the row's.
    """
    row = MODELS[name]
    config_class = getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), row.config)
    model_class = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), row.model)
    arguments = {**row.arguments, **({} if layers is None else {"num_hidden_layers": layers})}
    with torch.random.fork_rng(devices=[]):
        model = model_class._from_config(config_class(**arguments), experts_implementation=experts_implementation)
    randomise(model.float(), seed)
    return model.eval()


def make_token_ids(seed: int, batch: int = 2, seq: int = 5) -> torch.Tensor:
    """Returns token ids [batch, seq], without the padding id."""
    return torch.randint(2, 128, (batch, seq), generator=torch.Generator().manual_seed(seed))
