"""`python -m kvtune` is the `kvtune` command."""

import sys

from kvtune.cli.main import main

sys.exit(main())
