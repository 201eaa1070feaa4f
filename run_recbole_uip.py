"""Train RecBole's models with and without inferred user profiles; see README.md."""

import sys

from recbole_uip.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main())
