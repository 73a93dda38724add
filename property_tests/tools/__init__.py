"""Tools around the tests: mutation testing, memory measurements, generated pages."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
