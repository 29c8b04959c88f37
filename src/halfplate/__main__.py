"""`python -m halfplate`."""

import sys

from halfplate.cli import main

sys.exit(main())
