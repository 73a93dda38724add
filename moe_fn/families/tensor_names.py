"""Names and axes of a block's tensors in checkpoint files, with the names that several families share.

Read from transformers 5.23's conversions and its models' own names.
"""

from dataclasses import dataclass

from moe_fn.records import Path

# Positions along an axis that one element covers; None: all of them; an axis without an entry: 1
Units = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, or one for each expert, and the part of MoEWeights that it holds.

    weight    path in MoEWeights of the tensor that it is, or is a part of
    name      relative to the block's prefix; {e} is an expert, {second} an expert of a second bank; "../" is the parent
              of the block
    axes      its pattern (`moe_fn.checkpoint.axes`)
    pins      fixed indices on axes that the pattern does not have, or from which one index is taken: ("G", 0) is the
              gate, ("G", 1) the up
    optional  whether a file may lack it
    offset    is added to the file's values (norms that multiply by 1 + weight); such a tensor is float32 in memory
    scales    whether the tensor of the entries before it is multiplied by it, divided by the square root of its length
              (the norm of Gemma-4's gate)
    coding    for a tensor of a quantized matrix: a row of `moe_fn.checkpoint.quantized.codings.CODINGS`
    units     positions along axes that one of its elements covers: 8 codes in an int32, 128 that share a scale
    """

    weight: Path
    name: str
    axes: str
    pins: tuple[tuple[str, int], ...] = ()
    optional: bool = False
    offset: float = 0.0
    scales: bool = False
    coding: str = ""
    units: Units = ()


@dataclass(frozen=True)
class TensorNames:
    """Names of a block's tensors in files.

    name        of the layout: `layout=` of the functions in `moe_fn.checkpoint`
    block       name of the block's module in its layer, as "mlp" in "model.layers.3.mlp"; "" for none
    entries     its tensors
    others      names relative to the prefix that are not part of MoEWeights ("gate.*": every name with this beginning);
                {z} is a zero expert
    owned       beginnings of names, relative to the prefix, with which an unknown tensor is an error
    also_split  whether a second layout has the experts one by one, as quantization tools (llm-compressor, ModelOpt)
                save them
    """

    name: str
    block: str
    entries: tuple[Entry, ...]
    others: tuple[str, ...] = ()
    owned: tuple[str, ...] = ("",)
    also_split: bool = False


def per_expert(gate: str, up: str, down: str, experts: str = "experts.{e}.") -> tuple[Entry, ...]:
    """Entries of three matrices per expert: [I, X], [I, X] and [X, I]."""
    return (
        Entry(("gate_up",), f"{experts}{gate}.weight", "I X", (("G", 0),)),
        Entry(("gate_up",), f"{experts}{up}.weight", "I X", (("G", 1),)),
        Entry(("down",), f"{experts}{down}.weight", "X I"),
    )


def ungated(up: str, down: str, experts: str = "experts.{e}.", bias: bool = False) -> tuple[Entry, ...]:
    """Entries of two matrices per expert, and optionally two biases."""
    matrices = (
        Entry(("gate_up",), f"{experts}{up}.weight", "I X", (("G", 0),)),
        Entry(("down",), f"{experts}{down}.weight", "X I"),
    )
    biases = (
        Entry(("gate_up_bias",), f"{experts}{up}.bias", "I", (("G", 0),)),
        Entry(("down_bias",), f"{experts}{down}.bias", "X"),
    )
    return matrices + biases if bias else matrices


def fused(gate_up: str, down: str, rows: str = "G I", transposed: bool = False) -> tuple[Entry, ...]:
    """Entries of one gate_up tensor and one down tensor that hold all experts."""
    return (
        Entry(("gate_up",), gate_up, f"E X ({rows})" if transposed else f"E ({rows}) X"),
        Entry(("down",), down, "E I X" if transposed else "E X I"),
    )


def fused_biases(rows: str) -> tuple[Entry, ...]:
    """Entries of the biases of a fused gate_up and down."""
    return (
        Entry(("gate_up_bias",), "experts.gate_up_proj_bias", f"E ({rows})"),
        Entry(("down_bias",), "experts.down_proj_bias", "E X"),
    )


def router(
    gate: str, correction: str | None = None, *, bias: str | None = None, ids: str | None = None
) -> tuple[Entry, ...]:
    """Entries of the router's gate and, if named, the selection bias, the bias of the logits, and the table of hash
    routing.
    """
    found = (
        (("router", "gate"), gate, "C W"),
        (("router", "correction_bias"), correction, "D"),
        (("router", "bias"), bias, "C"),
        (("router", "expert_ids_of_token"), ids, "V K"),
    )
    return tuple(Entry(weight, name, axes) for weight, name, axes in found if name is not None)


def shared(
    module: str = "shared_experts",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    *,
    sigmoid: str | None = None,
) -> tuple[Entry, ...]:
    """Entries of a dense gated MLP with optional biases and, if named, the vector of a sigmoid gate."""
    matrices = (
        Entry(("shared", "gate_up"), f"{module}.{gate}.weight", "(N M) H", (("B", 0),)),
        Entry(("shared", "gate_up"), f"{module}.{up}.weight", "(N M) H", (("B", 1),)),
        Entry(("shared", "down"), f"{module}.{down}.weight", "H (N M)"),
        Entry(("shared", "gate_up_bias"), f"{module}.{gate}.bias", "(N M)", (("B", 0),), optional=True),
        Entry(("shared", "gate_up_bias"), f"{module}.{up}.bias", "(N M)", (("B", 1),), optional=True),
        Entry(("shared", "down_bias"), f"{module}.{down}.bias", "H", optional=True),
    )
    return matrices if sigmoid is None else (*matrices, Entry(("shared", "gate"), sigmoid, "1 H"))


def ungated_shared(module: str, up: str, down: str) -> tuple[Entry, ...]:
    """Entries of a dense MLP without a gate."""
    return (
        Entry(("shared", "gate_up"), f"{module}.{up}.weight", "(N M) H", (("B", 0),)),
        Entry(("shared", "down"), f"{module}.{down}.weight", "H (N M)"),
        Entry(("shared", "gate_up_bias"), f"{module}.{up}.bias", "(N M)", (("B", 0),), optional=True),
        Entry(("shared", "down_bias"), f"{module}.{down}.bias", "H", optional=True),
    )


def latent(down: str, up: str, input_norm: str | None = None, offset: float = 0.0) -> tuple[Entry, ...]:
    """Entries of the projections into and out of a latent space with optional biases and, if named, the input norm."""
    found = (
        Entry(("latent", "input"), f"{down}.weight", "L H"),
        Entry(("latent", "output"), f"{up}.weight", "H L"),
        Entry(("latent", "input_bias"), f"{down}.bias", "L", optional=True),
        Entry(("latent", "output_bias"), f"{up}.bias", "H", optional=True),
    )
    if input_norm is None:
        return found
    return (*found, Entry(("latent", "input_norm"), f"{input_norm}.weight", "L", offset=offset))


EACH = per_expert("gate_proj", "up_proj", "down_proj")
W132 = per_expert("w1", "w3", "w2")
FUSED = fused("experts.gate_up_proj", "experts.down_proj")
TRANSPOSED = fused("experts.gate_up_proj", "experts.down_proj", transposed=True)
STACKED = fused("input_linear.weight", "output_linear.weight")

# Names that several families share. A file may be in any of a tuple: the names in it decide.
_QWEN = router("gate.weight") + shared("shared_expert", sigmoid="shared_expert_gate.weight")
QWEN = (
    TensorNames("qwen", "mlp", EACH + _QWEN),
    TensorNames("qwen fused", "mlp", FUSED + _QWEN),
    TensorNames("qwen fused, transposed", "mlp", TRANSPOSED + _QWEN),
)
ROUTER_AND_SHARED = router("gate.weight", "gate.e_score_correction_bias") + shared()
DEEPSEEK = (
    TensorNames("deepseek", "mlp", EACH + ROUTER_AND_SHARED),
    TensorNames("deepseek fused", "mlp", FUSED + ROUTER_AND_SHARED),
)
MIXTRAL = (
    TensorNames("mixtral", "block_sparse_moe", W132 + router("gate.weight", "e_score_correction_bias") + shared()),
)
