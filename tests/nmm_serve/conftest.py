import sys
from pathlib import Path

# Tests are imported one by one (--import-mode=importlib), so shared helpers need a place on the path.
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
