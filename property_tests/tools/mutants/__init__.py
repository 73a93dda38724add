"""Mutation testing: does a test fail for every small change of the code?

made      the mutants of a Python file, as mutmut makes them; triton those of a Triton kernel, cpp of a C++ one
judges    the tests that judge the mutants of each file; areas the files around the stages, and their tests
judged    a mutant in a forked process; forked the same for tests that are collected once; copied in a copy of the tree
same      reasons why a survivor is the same program; report the page
"""
