"""Mutation testing: does a test fail for every small change of the code?

made      mutants of a Python file, by mutmut; triton: of a Triton kernel; cpp: of a C++ kernel
judges    the tests for the mutants of each file; areas: the files around the stages and their tests
judged    tests a mutant in a forked process; forked: the same with tests that are collected once; copied: in a copy of
          the tree
same      reasons why a surviving mutant is an equivalent program; report: the page
"""
