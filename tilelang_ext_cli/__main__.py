import sys

from tilelang_ext_cli import main

sys.exit(main())
