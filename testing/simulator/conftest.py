"""Tests that download other people's kernels run only when asked for: `pytest -m peers`."""


def pytest_collection_modifyitems(config, items):
    if "peers" in config.option.markexpr:
        return
    peers = [item for item in items if item.get_closest_marker("peers")]
    config.hook.pytest_deselected(items=peers)
    items[:] = [item for item in items if item not in peers]
