"""Helpers of property_tests and compile_tests: tiny random modules of transformers and torchtitan, processes of ranks,
and settings of a test session."""
