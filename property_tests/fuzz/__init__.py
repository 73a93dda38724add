"""Fuzzing of what is read from strangers: configs and checkpoints. Whatever comes in, only ValueError comes out, soon
and in little memory.

    choices   bytes as decisions: a fuzzer's, or those that the tests replay
    mutate    decisions as damage to JSON and to bytes
    seeds     whole configs and checkpoints to start from
    targets   damage a seed, read it, look at what comes out

`python -m fuzz checkpoint --seconds 60` (in property_tests, with atheris) lets coverage guide it; `make fuzz` runs
every target.
"""
