"""Floor 4: ``python -m torch_dropout_ir``, where the command is not on the path."""

import sys

from torch_dropout_ir.cli import main

sys.exit(main())
