"""`python -m lamina`: the same as the `lamina` command."""

import sys

from lamina.cli import main

sys.exit(main())
