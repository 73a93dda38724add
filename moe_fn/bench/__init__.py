"""Benchmark of the layer against other implementations, on your own machine: `python -m moe_fn.bench --list`.

In one run, contestants take turns; the report has the time of each, whether its result is right, and its share of the
machine's floor, the time that memory bandwidth and arithmetic allow.

    models        shapes of published families                  problem      random weights and inputs of a model
    contestants   implementations to time, one row each         checking     comparison with `moe_fn.reference`
    floor         least time by bandwidth and arithmetic        timing       turns, medians, the clock of a device
    combination   one run of a model, dtype and thread count    results      records of the results
    memory        activation memory of a training step          report, plot, machine      output

On a GPU, floor_cuda and timing_cuda replace the floor's probes and the clock.

No other module of moe_fn imports it.
"""
