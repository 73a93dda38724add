"""A model of transformers without and with moe_fn: tokens per second, graphs, logits, tokens. Needs
`pip install "moe_fn[transformers]"`.

    python examples/hf_model.py [--model qwen3-moe|deepseek-v3|gpt-oss|mixtral] [--dtype float32|bfloat16]
    python examples/hf_model.py --checkpoint FOLDER         # any folder that transformers loads; nothing is downloaded

Without a folder it makes a small random model, saves it and loads it. Four variants are measured in turns: the model of
transformers (with its default experts implementation) and the same with moe_fn, each eager and compiled
(`fullgraph=True`). `--how experts` replaces only the experts (`register`); routers and blocks are transformers'.
"""

import argparse
import copy
import datetime
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from small_models import MODELS, small_model
from torch import Tensor
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.utils import counters

from moe_fn.bench.timing import clock_of_device, take_turns
from moe_fn.checkpoint.progress import Progress, clear
from moe_fn.integrations.transformers import register, replace_moe_blocks

NOTE = """Both models share their parameters. Prefill is one call on the prompt, without a cache. Decode is greedy, one
token at a time: eager with transformers' growing cache (as in `generate`), compiled with its static cache, so that one
graph serves every step; the prompt is put into the cache before the measurement. Medians of {turns} turns or more,
with alternating contestants and changing prompts. Graphs: prefill + decode. Logits of a prompt are compared with
transformers eager, and tokens with transformers' own `generate`. Weights are those of the checkpoint, not prepared
(`moe_fn.prepare_weights`). In bfloat16 rounding may send a token to another expert where two are nearly equal; the
difference of transformers' own compiled model shows how often."""
PROMPTS = 4


@dataclass(frozen=True)
class Contestant:
    """A model and its functions.

    prefill  ids [B, T] -> logits [B, T, V]
    step     (ids [B, 1], cache, positions [1, 1]) -> next ids [B, 1]; the cache is changed
    trouble  the reason why it does not compile; "" if it does
    """

    model: Any
    prefill: Callable[[Tensor], Tensor]
    step: Callable[[Tensor, Any, Tensor], Tensor]
    compiled: bool = False
    trouble: str = ""
    graphs: tuple[int, int] = (0, 0)  # of prefill, of decode
    breaks: int = 0
    compile_seconds: float = 0.0


def contestant_of_model(model: Any) -> Contestant:
    def prefill(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    def step(ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
        return next_ids(model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits)

    return Contestant(model, prefill, step)


def next_ids(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def decoding(one: Contestant, prompt: Tensor, new: int) -> Callable[[], Tensor]:
    """Fills a cache with the prompt. Returns a function that decodes new - 1 tokens after the first: ids [B, new]."""
    length = prompt.shape[1]
    config = one.model.config
    cache = (
        transformers.StaticCache(config=config, max_cache_len=length + new)
        if one.compiled
        else transformers.DynamicCache(config=config)
    )
    first = next_ids(one.model(prompt, past_key_values=cache, use_cache=True).logits)
    positions = torch.arange(length, length + new - 1).view(-1, 1, 1)

    def run() -> Tensor:
        ids = [first]
        for position in positions:
            ids.append(one.step(ids[-1], cache, position))
        return torch.cat(ids, 1)

    return run


def compiled(one: Contestant, prompt: Tensor, new: int, backend: str) -> Contestant:
    """Returns the contestant compiled and run once, with its counts of graphs and breaks."""
    start = time.perf_counter()
    counters.clear()
    reset_code_state()  # so that sizes that were dynamic for the previous contestant start as static
    whole = partial(torch.compile, fullgraph=True, backend=backend)
    ours = replace(one, prefill=whole(one.prefill), step=whole(one.step), compiled=True)
    try:
        ours.prefill(prompt)
        of_prefill = graph_count()
        decoding(ours, prompt, new)()
    except Exception as error:  # any error of torch or the model; the others are still measured
        return replace(ours, trouble=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
    graphs = (of_prefill, graph_count() - of_prefill)
    breaks = sum(counters["graph_break"].values())
    return replace(ours, graphs=graphs, breaks=breaks, compile_seconds=time.perf_counter() - start)


def graph_count() -> int:
    return int(counters["stats"]["unique_graphs"])


def with_moe_fn(model: Any, how: str) -> Any:
    """Returns a copy that shares every parameter and buffer, with moe_fn's layers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    if how == "blocks":
        print(replace_moe_blocks(twin))
    else:
        register()
        twin.set_experts_implementation("moe_fn")
        print("moe_fn is the experts implementation of every layer")
    return twin


def load(options: argparse.Namespace) -> Any:
    """Loads the model from the folder, or from a temporary one to which a small random model was saved."""
    if options.checkpoint:
        return transformers.AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype=options.dtype or "auto", local_files_only=True
        ).eval()  # fmt: skip
    dtype = getattr(torch, options.dtype or "float32")
    with tempfile.TemporaryDirectory() as folder:
        small_model(options.model, dtype, options.tiny).save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        print(f"{options.model}: random, {size / 1e6:.0f} MB saved, and loaded in {time.perf_counter() - start:.1f} s")
    return model


def measure(
    options: argparse.Namespace, runners: dict[str, Contestant], prompts: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Returns tokens per second (prefill, decode) of all contestants that run."""
    running = {name: one for name, one in runners.items() if not one.trouble}
    timer, before = clock_of_device(torch.device("cpu")).time, graph_count()
    prefills = {
        name: lambda turn, one=one: lambda: one.prefill(prompts[turn % PROMPTS]) for name, one in running.items()
    }
    decodes = {
        name: lambda turn, one=one: decoding(one, prompts[turn % PROMPTS], options.new) for name, one in running.items()
    }
    by_prefill = take_turns(prefills, timer, options.seconds, 1)
    by_decode = take_turns(decodes, timer, options.seconds, 1)
    print(f"graphs made while the clock ran: {graph_count() - before}")

    def speed(tokens: int, milliseconds: tuple[float, ...]) -> float:
        return options.batch * tokens / median(milliseconds) * 1e3

    return {
        name: (speed(options.prompt, by_prefill[name]), speed(options.new - 1, by_decode[name])) for name in running
    }


def print_table(
    runners: dict[str, Contestant], speeds: dict[str, tuple[float, float]], prompt: Tensor, new: int
) -> None:
    theirs = next(iter(runners.values()))
    logits = theirs.prefill(prompt).float()
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    tokens = theirs.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[
        :, prompt.shape[1] :
    ]
    print(
        "\n| | prefill tokens/s | decode tokens/s | graphs | breaks | largest logit difference | over their RMS | same "
        "tokens |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, one in runners.items():
        if one.trouble:
            print(f"| {name} | {' | '.join(['-'] * 7)} |\n\n{name} does not compile: {one.trouble}\n")
            continue
        difference = (one.prefill(prompt).float() - logits).abs().max().item()
        same = (decoding(one, prompt, new)() == tokens).all(0).tolist()
        words = "yes" if all(same) else f"the first {same.index(False)} of {new}"
        graphs, breaks = (f"{one.graphs[0]} + {one.graphs[1]}", one.breaks) if one.compiled else ("-", "-")
        rms = logits.square().mean().sqrt().item()
        print(
            f"| {name} | {speeds[name][0]:,.0f} | {speeds[name][1]:,.1f} | {graphs} | {breaks} "
            f"| {difference:.1e} | {difference / rms:.1e} | {words} |"
        )  # fmt: skip


def options_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("--model", choices=MODELS, default="qwen3-moe", help="the small random model, without a folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, or the checkpoint's dtype")
    parser.add_argument("--how", choices=("blocks", "experts"), default="blocks")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the turns of prefill, and again for decode")
    parser.add_argument(
        "--backend", default="inductor", help="of torch.compile; aot_eager compiles quickly and runs slowly"
    )
    parser.add_argument("--tiny", action="store_true", help="a model that is small enough for a test")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options, start = options_of_command(), time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    progress = Progress(total=5, done=0, label=str(options.checkpoint or options.model))
    progress.say("loading")
    model = load(options)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [
        torch.randint(2, vocabulary, (options.batch, options.prompt), generator=generator) for _ in range(PROMPTS)
    ]
    implementation = getattr(model.config, "_experts_implementation", None) or "eager"
    eager = {
        f"transformers ({implementation})": contestant_of_model(model),
        "moe_fn": contestant_of_model(with_moe_fn(model, options.how)),
    }
    runners = dict(eager)
    for done, (name, one) in enumerate(eager.items(), start=1):
        replace(progress, done=done).say(f"compiling {name}")
        runners[f"{name} compiled"] = made = compiled(one, prompts[0], options.new, options.backend)
        print(f"{name}: compiled in {made.compile_seconds:.0f} s" if not made.trouble else f"{name}: does not compile")
    replace(progress, done=3).say("taking turns")
    speeds = measure(options, runners, prompts)
    replace(progress, done=4).say("comparing logits and tokens")
    print_table(runners, speeds, prompts[0], options.new)
    clear()
    names = list(speeds)
    ratios = [
        (ours, theirs) for ours, theirs in zip(names[1::2], names[::2], strict=False) if ours.startswith("moe_fn")
    ]
    for ours, theirs in ratios:
        prefill, decode = (speeds[ours][at] / speeds[theirs][at] for at in (0, 1))
        print(f"{ours} over {theirs}: prefill {prefill:.2f}, decode {decode:.2f} times as fast")
    print("\n" + NOTE.format(turns=5))
    print(
        f"{model.dtype}, batch {options.batch}, {options.prompt} tokens of prompt, {options.new} new; "
        f"{torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{datetime.date.today()}; {time.perf_counter() - start:.0f} s in all",
    )  # fmt: skip


if __name__ == "__main__":
    main()
