"""Fuzzing of readers of untrusted input, configs and checkpoints.

For any input they must return, or raise ValueError, quickly and with little memory.

    choices   decodes bytes, from a fuzzer or from a test, as decisions
    mutate    damages JSON and bytes by decisions
    seeds     valid configs and checkpoints to start from
    targets   damage a seed, read it, and check the result

`python -m fuzz checkpoint --seconds 60` (in property_tests, with atheris) fuzzes guided by coverage; `make fuzz` runs
every target.
"""
