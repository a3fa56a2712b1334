"""Scripts that train, compare and measure. Installed, they are modules: ``python -m sharded_shampoo4.launch.compare``.

They import each other as the scripts of one folder do, so the folder goes to the front of ``sys.path``.
"""

import sys
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)
