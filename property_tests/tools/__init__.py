"""What tests the tests, and what measures: mutants, changed kernels, memory, the page of errors."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
