"""Whether the tests can fail: each mutation breaks device or driver on purpose, and names the test that must notice.

`device.toml` and `driver.toml` are the mutations; `mutation` reads them, `tree` makes copies of the project to break,
`judge` runs a named test in one and says what became of it, `__main__` is `make mutants`.
"""
