"""The stages, one file each. They do not know of each other; `moe_fn.forward` joins them.

x [T, H] --- transform_input ---> [T, Hx] --- dispatch ---> rows [R, Hx] --- experts ---> rows [R, Hx] --- combine ---> [T, Hx]
   \\__ logits [T, choices] -- route --> Routing __/                                                                      |
   \\__ shared_experts ---> [T, H] -----------------------------------------------------------> join <--- transform_output
                                                                                                |
                                                                  reduce_and_trunc ---> + zero_experts ---> y [T, H]
"""
