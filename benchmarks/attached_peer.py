"""SAELens' side of attached.py, run by the interpreter of its environment (peers/environment sae_lens).

    attached_peer.py ASKED.json

It prints which forwards there are, then runs one for each line that it reads, and prints its seconds
of CPU time.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(asked["threads"])
    ids_BL = torch.tensor(asked["ids"])
    model = SAETransformerBridge.boot_transformers(asked["model"], device="cpu")
    saes = [SAE.load_from_disk(folder) for folder in asked["saes"]]
    turns: dict[str, Callable[[], object]] = {
        "forward": lambda: model(ids_BL),
        "run_with_saes, error term": lambda: model.run_with_saes(ids_BL, saes=saes, use_error_term=True),
        "run_with_saes": lambda: model.run_with_saes(ids_BL, saes=saes),
    }
    print(json.dumps(list(turns)), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            start = time.process_time()
            turns[line.strip()]()
            print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
