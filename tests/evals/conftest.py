import shutil
import sys
from pathlib import Path

import pytest

# Tests are imported one by one (--import-mode=importlib), so shared helpers need a place on the path.
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))


@pytest.fixture(autouse=True)
def _skip_without_java(request):
    if request.node.get_closest_marker("java") and shutil.which("java") is None:
        pytest.skip("needs a Java runtime on the PATH")
