from testreg.cli import main

raise SystemExit(main())
