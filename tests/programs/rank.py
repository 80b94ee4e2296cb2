"""A process of a launch that only writes down what the launcher made it: its environment, to a file in a folder.

The only argument is that folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

Path(sys.argv[1], os.environ.get("RANK", "0")).write_text(json.dumps(dict(os.environ)))
