"""`make conformance`: which items of the conformance checklist hold, shown by the tests that name them.

`items.toml` is the list. A test names what it proves by `@pytest.mark.conformance(number)`; `plugin` writes down what
became of such tests in one run of pytest, `verdict` makes an answer per item of all runs, `__main__` starts the runs:
what needs no guest once, the rest on every kernel.
"""
