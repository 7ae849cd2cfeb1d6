"""`python -m e2e`."""

import sys

from e2e.cli import main

sys.exit(main())
