"""Times the layer beside everything else that computes one, on your own machine: `python -m moe_fn.bench --list`.

In one run, contestants taking turns: how long each takes, whether its answer is right, and how near the machine's floor
it is.

    models        the real shapes of published families        problem      random weights and inputs of one of them
    contestants   who can be timed, one row each                checking     their answers against `moe_fn.reference`
    floor         what memory and arithmetic allow              timing       turns, medians, the clock of a device
    combination   one model x dtype x threads, start to end     results      the records of it
    memory        what a training step keeps                    report, plot, machine      what comes out

On a GPU the floor's probes and the clock are those of floor_cuda and timing_cuda; the rest is the same.

Nothing else in moe_fn imports it.
"""
