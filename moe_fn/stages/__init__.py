"""The stages of the layer, one file each. They do not import each other; `moe_fn.layer.compose` composes them.

x [T, H] ─┬─> transform_input ──> dispatch ──> experts ──> combine ──> reduce_and_trunc ──> transform_output ─┐
          │                          ▲ [T·k, Hx], by expert   ▲                                               │
          ├─> route ─────────────────┴─ Routing [T, k] ───────┘                                               │
          ├─> shared_experts ──────────────────────────────────────────────────────────────────────────> join <┘
          │                                                                                                │
          └─> zero_experts ──────────────────────────────────────────────────────────────────────────────> +
                                                                               y [T, H] <── norm_output <──┘
"""
