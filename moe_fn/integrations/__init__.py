"""moe_fn inside other projects: one package for each, which imports its project only when it is called.

`moe_fn.integrations.transformers`   experts of Hugging Face's models (`pip install "moe_fn[transformers]"`)

Nothing in the rest of moe_fn imports this package.
"""
