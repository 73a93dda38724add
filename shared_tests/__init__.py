"""What property_tests and compile_tests both need: modules of transformers and torchtitan, tiny and random."""
