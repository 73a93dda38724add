"""The frequency of Python's garbage collection in a test session."""

import gc


def collect_less() -> None:
    """Excludes the imported modules from collection, and collects once in 50,000 new objects.

    torch and transformers leave a million objects that live to the end. Repeated searches of them took an eighth of the
    CPU time of compile_tests/test_one_graph.py: 70 s with Python's settings, 60 s with these.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
