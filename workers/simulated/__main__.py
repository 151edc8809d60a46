"""`python -m workers.simulated`: run one simulated engine."""

import sys

from workers.simulated.server import main

main(sys.argv[1:])
