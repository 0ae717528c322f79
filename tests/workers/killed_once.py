"""Our command line, of which rank 1 is killed in training at the launcher's first start."""

import os
import signal
import sys
from typing import Any

from monosemy.cli import main


def kill(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith("trainer_1.safetensors"):
        print("killed, for once", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.addaudithook(kill)
    sys.exit(main())
