"`python -m moe_merge_nb` is `moe-merge`."
import sys
from moe_merge_nb.run.cli import main

if __name__ == '__main__': sys.exit(main())
