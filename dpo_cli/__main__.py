"""Where the program starts: as `dpo`, or as `-m dpo_cli` of `python`, `torchrun` and `accelerate launch`.

Python answers an interrupt with a traceback, and importing the commands takes a while. So it is answered here first, by
what is there at once: an exception could be lost, or printed, in the middle of an import.
"""

import os


def main() -> None:
    """Run the command line. An interrupt ends the process until a command handles signals itself."""
    try:
        import signal

        # One that is ignored, as in the background of a script, stays ignored.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda number, frame: _stop())
    except KeyboardInterrupt:
        _stop()
    from dpo_cli.cli import main

    try:
        main()
    finally:
        # Its work is done and its status known; while Python ends, an interrupt could only lose what is printed last.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop() -> None:
    """End the process with the words and the status of `Interrupted`; of several processes the main one speaks."""
    try:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopped by SIGINT\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
