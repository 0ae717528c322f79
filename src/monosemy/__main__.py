import sys

from monosemy.cli import main

sys.exit(main())
