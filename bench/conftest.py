"""Options of the pytest-benchmark suites."""


def pytest_addoption(parser):
    """Add ``--real``: the shapes of real models, in place of tiny ones."""
    parser.addoption("--real", action="store_true", help="real models' shapes, not tiny ones")
