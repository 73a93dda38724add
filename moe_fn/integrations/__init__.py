"""moe_fn layers inside other projects: one package for each, which imports its project only when it is called.

`moe_fn.integrations.transformers`   Hugging Face's models: experts, whole blocks, a block's config and weights
                                     (`moe_fn[transformers]`)
`moe_fn.integrations.torchtitan`     torchtitan's experts, local dispatcher and layer
`moe_fn.integrations.vllm`           an experts class for vLLM's modular kernels, and the plug-in that registers it

Nothing in the rest of moe_fn imports this package.
"""
