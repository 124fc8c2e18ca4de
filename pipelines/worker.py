"""One process of torchrun: the command line of pixelclip, which starts after a wait if torchrun restarted it."""

import os
import time

from pixelclip_pipelines.supervisor import ATTEMPT, delay


def main() -> None:
    """Run the command line of pixelclip."""
    restart, restarts = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restart:
        first = int(os.environ.get(ATTEMPT, "1"))
        attempt, seconds = first + restart, delay(first + restart)
        if os.environ.get("RANK") == "0":
            print(
                f"train: attempt {attempt} of {first + restarts}, after a process failed, "
                f"starts in {seconds:g} s and continues after the last checkpoint",
                flush=True,
            )
        time.sleep(seconds)
    from pixelclip.cli.app import main as command_line

    command_line()


if __name__ == "__main__":
    main()
