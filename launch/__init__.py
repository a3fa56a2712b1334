"""Scripts that train, compare and measure. Installed, they are modules: ``python -m sharded_shampoo4.launch.compare``.

They import each other as the scripts of one folder do. So under ``python -m`` the folder goes to the front of
``sys.path``, as that of a script does.
"""

import sys
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)
if sys.argv[0] == "-m" and _HERE not in sys.path:  # while Python looks for the module
    sys.path.insert(0, _HERE)
