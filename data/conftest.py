"""What the tests here share; a second process makes the exports that some of them need."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # as `python -m pytest` does
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests of exports come last."""
    items.sort(key=lambda item: "exported" in item.fixturenames)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def exporting(request, tmp_path_factory):
    """Exports take a minute: they are made beside the tests that come before."""
    if not any("exported" in item.fixturenames for item in request.session.items):
        yield
        return
    from test_export import EXPORTS, export_one  # here: the tests of readers need no model
    folder = tmp_path_factory.mktemp("onnx")
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield folder, pool.map(export_one, [folder] * len(EXPORTS), EXPORTS)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def exported(exporting):
    """The folder of EXPORTS, what each of them printed, and its model by name."""
    import tinyinr
    folder, outputs = exporting
    return SimpleNamespace(folder=folder, printed=dict(outputs),
                           model=lambda name: tinyinr.load(folder / f"{name}.pt"))
