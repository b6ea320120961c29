"""`python -m rgd`: what is installed, which backends are active, and whether their numbers are right."""

import sys

from rgd._about import main

if __name__ == "__main__":
    sys.exit(main())
