"""The tests for the mutants of each file: the fastest ones for every mutant, and the file's own for what survives."""

# called without pytest
DIRECT = ("test_layer.test_the_layer_equals_the_reference", "test_layer.test_any_routing_equals_the_reference")
WITH_DIRECT: dict[str, tuple[str, ...]] = {
    "moe_fn/fused/route.py": ("test_route.test_routing_equals_the_reference",),
    "moe_fn/stages/route.py": ("test_route.test_routing_equals_the_reference",),
    "moe_fn/stages/_scores.py": (
        "test_route.test_routing_equals_the_reference",
        "test_route.test_ties_go_to_the_lowest_expert_id",
    ),
    "moe_fn/stages/experts.py": (
        "test_quant.test_quantized_layers_equal_the_reference",
        "test_layer.test_gradients_equal_the_reference",
    ),
    "moe_fn/stages/_adapters.py": ("test_lora.test_merged_equals_applied",),
    "moe_fn/balance/losses.py": ("test_layer.test_losses_equal_the_reference",),
    "moe_fn/quant/numbers.py": ("test_quant.test_quantized_layers_equal_the_reference",),
}
ALL_STAGES = (
    "property_tests/test_stages_of_routing.py",
    "property_tests/test_stages_around.py",
    "property_tests/test_stages.py",
)
LORA = "property_tests/test_lora.py::test_lora_equals_the_reference"
AROUND = "property_tests/test_around_the_experts.py"
OWN: dict[str, tuple[str, ...]] = {
    "moe_fn/fused/route.py": ("property_tests/test_route.py",),
    "moe_fn/stages/route.py": ("property_tests/test_route.py",),
    "moe_fn/stages/dispatch.py": ("property_tests/test_dispatch.py", LORA),
    "moe_fn/stages/combine.py": ("property_tests/test_combine.py",),
    "moe_fn/stages/experts.py": (
        LORA,
        "property_tests/test_quant.py::test_static_scales_cover_what_was_seen",
        "property_tests/test_quant.py::test_gradients_pass_through_the_rounding_of_inputs",
    ),
    "moe_fn/stages/join.py": (AROUND,),
    "moe_fn/stages/zero_experts.py": (AROUND,),
    "moe_fn/stages/reduce_and_trunc.py": (
        AROUND,
        "property_tests/test_bad_input.py",
        "compile_tests/test_parallel_traffic.py",
    ),
    "moe_fn/stages/_scores.py": ("property_tests/test_route.py",),
    "moe_fn/stages/_adapters.py": ("property_tests/test_lora.py", "compile_tests/test_lora.py"),
    "moe_fn/balance/losses.py": ("property_tests/test_layer.py",),
    "moe_fn/quant/numbers.py": ("property_tests/test_quant_numbers.py", "property_tests/test_quant.py"),
    "moe_fn/ops/grouped_matmul.py": (
        "property_tests/test_experts.py",
        "compile_tests/test_op_contracts.py",
        "compile_tests/test_transforms.py",
        "compile_tests/test_contexts.py",
    ),
    "moe_fn/ops/rows.py": (
        "compile_tests/test_op_contracts.py",
        "compile_tests/test_transforms.py",
        "compile_tests/test_contexts.py",
    ),
}


def direct_of(file: str) -> tuple[str, ...]:
    """Returns names of tests without arguments, which run first."""
    return (*WITH_DIRECT.get(file, ()), *DIRECT)


def tests_of(file: str) -> tuple[str, ...]:
    """Returns arguments of pytest for what survives those."""
    return (*ALL_STAGES, *OWN.get(file, ()))
