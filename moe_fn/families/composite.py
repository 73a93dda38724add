"""Which part of a config.json holds a layer's words: a model of many parts nests a config for each, and names its
tensors by the part.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Words = Mapping[str, Any]
# What models call their language model, and in which order it is looked for
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
_DEPTH = 4  # configs in configs in configs: deeper ones are not looked for


@dataclass(frozen=True)
class Part:
    """A nested config that is a Mixture of Experts.

    path        where it lies in config.json
    model_type  its class, whatever it says itself; with `chosen`, only where it says nothing
    named       what stands in the names of its tensors and of no other part's; empty: all other names
    """

    path: tuple[str, ...]
    model_type: str
    named: tuple[str, ...] = ()
    chosen: bool = False


def _text(model_type: str, *, chosen: bool = False) -> tuple[Part, ...]:
    return (Part(("text_config",), model_type, chosen=chosen),)


# By the outer model_type, the language model first: it is what transformers calls a model's text config.
PARTS: Mapping[str, tuple[Part, ...]] = {
    "aria": _text("aria_text"),
    "deepseek_ocr2": _text("deepseek_ocr2_text"),
    "diffusion_gemma": _text("diffusion_gemma_text"),
    "dots3_note": (
        Part(("text_config",), "dots3_note_text"),
        Part(("vision_config",), "dots3_note_vision_encoder", ("vision_tower", "vision_encoder", "visual")),
    ),
    "ernie4_5_vl_moe": _text("ernie4_5_vl_moe_text"),
    "gemma4": _text("gemma4_text"),
    "gemma4_assistant": _text("gemma4_text", chosen=True),
    "glm4v_moe": _text("glm4v_moe_text"),
    "glm5_next": _text("glm5_next_text"),
    "inkling": _text("inkling_text"),
    "inkling2": _text("inkling2_text"),
    "inkling_mm_model": _text("inkling_text"),
    "kimi_k25": _text("deepseek_v3", chosen=True),
    "llama4": _text("llama4_text"),
    "minimax_m3_vl": _text("minimax_m3_vl_text"),
    "mistral_large4": _text("mistral_large4_text"),
    "muse_spark": _text("muse_spark_text"),
    "nemo_speechlm": _text("nemotron_h", chosen=True),
    "nemotron_h_omni": _text("nemotron_h", chosen=True),
    "qwen3_5_moe": _text("qwen3_5_moe_text"),
    "qwen3_omni_moe": (
        Part(("thinker_config", "text_config"), "qwen3_omni_moe_text", ("thinker",)),
        Part(("talker_config", "text_config"), "qwen3_omni_moe_talker_text", ("talker",)),
    ),
    "qwen3_omni_moe_thinker": _text("qwen3_omni_moe_text"),
    "qwen3_vl_moe": _text("qwen3_vl_moe_text"),
    "qwen4_exp": _text("qwen4_exp_text"),
    "step3p7": _text("step3p5"),
    "unlimited_ocr": _text("unlimited_ocr_text"),
}


def part_of_layer(model_config: Words, known: Container[str], prefix: str | None = None) -> tuple[str, Words]:
    """The model_type and the words of the part that holds a layer, by what the names of its tensors begin with.

    Without a prefix it is the language model. A model that is not listed is searched for nested configs of a known
    model_type. Where there is none, the model_type is what the file says instead.
    Raises ValueError for a prefix that belongs to none of a model's parts.
    """
    outer = model_config.get("model_type")
    if isinstance(outer, str) and outer in PARTS:
        part = _named(PARTS[outer], prefix)
        words = _nested(model_config, part.path)
        said = words.get("model_type")
        return (said if part.chosen and isinstance(said, str) and said not in PARTS else part.model_type), words
    if isinstance(outer, str) and outer in known:
        return outer, model_config
    found = list(_inside(model_config, known))
    if not found:
        types = ([repr(outer)] if outer is not None else []) + [repr(name) for name in _types(model_config)]
        return " or ".join(types) or "missing", {}
    names = (prefix or "").split(".")
    path_and_words = next(
        (entry for entry in found if any(key.removesuffix("_config") in names for key in entry[0])), found[0]
    )
    return part_of_layer(path_and_words[1], known, prefix)


def _named(parts: tuple[Part, ...], prefix: str | None) -> Part:
    if prefix is None:
        return parts[0]
    names = prefix.split(".")
    found = [part for part in parts if any(name in names for name in part.named)] or [
        part for part in parts if not part.named
    ]
    if not found:
        wanted = " or ".join(repr(name) for part in parts for name in part.named)
        raise ValueError(
            f"the model has {len(parts)} parts with experts, and {prefix!r} does not say which; expected {wanted} in it"
        )
    return found[0]


def _nested(model_config: Words, path: tuple[str, ...]) -> Words:
    """What lies at a path; the text config may have an older name, or be the whole file."""
    words: Any = model_config
    for name in path:
        names = _TEXT_CONFIGS[:3] if path == ("text_config",) else (name,)
        inner = next(
            (words[key] for key in names if words.get(key) is not None), model_config if len(names) > 1 else {}
        )
        if not isinstance(inner, Mapping):
            raise ValueError(f"{name} is {inner!r:.80} in the model's config; expected a JSON object")
        words = inner
    return words  # type: ignore[no-any-return]


def _inside(model_config: Words, known: Container[str], depth: int = _DEPTH) -> Iterator[tuple[tuple[str, ...], Words]]:
    """The nested configs of a known model_type with the paths to them, language models first."""
    order = sorted(
        model_config, key=lambda name: _TEXT_CONFIGS.index(name) if name in _TEXT_CONFIGS else len(_TEXT_CONFIGS)
    )
    for name in order:
        inner = model_config[name]
        if isinstance(inner, Mapping):
            said = inner.get("model_type")
            if isinstance(said, str) and (said in known or said in PARTS):
                yield (name,), inner
            elif depth:
                yield from (((name, *path), words) for path, words in _inside(inner, known, depth - 1))


def _types(model_config: Words, depth: int = _DEPTH) -> Iterator[str]:
    for inner in model_config.values():
        if isinstance(inner, Mapping):
            if isinstance(inner.get("model_type"), str):
                yield inner["model_type"]
            yield from _types(inner, depth - 1) if depth else ()
