"""`hfms` and `python -m hfms_cli`."""

import sys


def main() -> int:
    """Run the command line. Returns its exit status; see `docs/cli.md`."""
    try:
        # Imported here, so that Ctrl-C while Python still reads modules ends as quietly as later.
        from hfms_cli.cli.app import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
