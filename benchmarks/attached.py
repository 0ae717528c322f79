"""What attached SAEs add to a forward of SmolLM2-135M, beside what their encode and decode cost alone.

    python benchmarks/attached.py [--rounds 15] [--rows 4] [--tokens 128] [--latents 4096] [--peer]
    python benchmarks/attached.py --attribution 2048    # memory of `attribute` for so many tokens

Eight SAEs of random weights (jump_relu, about 40 active latents of a token) at resid_post of layers 3, 6 to
24. Timed in turn, as many rounds as asked after two that are not counted; medians of CPU time, so that what
else runs on the machine counts little: the forward by itself; with the SAEs attached and four latents of each
edited, the error kept; the same without the error; with all latents edited by one function; what the hooks of
these do without the model; and encode and decode of all eight on activations of the same shape. --peer adds
SAELens' SAETransformerBridge with the same SAEs (peers/environment sae_lens), with its error term and without.
OMP_NUM_THREADS=1 makes CPU time that of one thread.

B rows of a batch, L tokens, D width, F latents.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

import monosemy
from benchmarks.same_maths import MODEL
from monosemy import LanguageModel, Site, edit
from monosemy.architectures.jump_relu import JumpReLU
from monosemy.lm import embedded
from monosemy.sae import SAE
from monosemy.use import attach

LAYERS, ACTIVE, WARM = tuple(range(3, 25, 3)), 40, 2
EDITS = {17: edit.set(40), 3: edit.ablate(), 5: edit.scale(2), 8: edit.add(4)}
PEER = Path(__file__).parents[1] / ".venv-peers" / "sae_lens" / "bin" / "python"


def sae_at(layer: int, x_ND: Tensor, F: int) -> SAE:
    """An SAE of random unit rows, whose threshold leaves about ACTIVE latents of these activations."""
    sae = JumpReLU(x_ND.shape[1], F)
    draw = torch.Generator().manual_seed(layer)
    rows_FD = normalize(torch.randn(F, x_ND.shape[1], generator=draw), dim=1)
    sae.W_enc.data.copy_(rows_FD)
    sae.W_dec.data.copy_(rows_FD)
    sae.b_enc.data.copy_(-(x_ND.mean(0) @ rows_FD.T))
    pre_NF = x_ND[:256] @ rows_FD.T + sae.b_enc
    sae.threshold.data.fill_(float(pre_NF.flatten().kthvalue(int(pre_NF.numel() * (1 - ACTIVE / F))).values))
    sae.metadata = {"site": f"resid_post.{layer}", "model": MODEL}
    return sae.eval()


@contextmanager
def peer_side(saes: list[SAE], ids_BL: Tensor) -> Iterator[dict[str, Callable[[], float]]]:
    """Yield the peer's forwards, each of which runs once and returns its seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for i, sae in enumerate(saes):
            sae.save_pretrained(Path(scratch, f"ours_{i}"))
            folders.append(str(Path(scratch, f"theirs_{i}")))
            monosemy.formats.convert(Path(scratch, f"ours_{i}"), folders[-1], "sae_lens")
        model = str(embedded.model_folder(MODEL))
        asked = {"model": model, "saes": folders, "ids": ids_BL.tolist(), "threads": torch.get_num_threads()}
        Path(scratch, "asked.json").write_text(json.dumps(asked))
        command = [
            str(PEER),
            str(Path(__file__).with_name("attached_peer.py")),
            str(Path(scratch, "asked.json")),
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            names = json.loads(process.stdout.readline())

            def once(name: str) -> float:
                print(name, file=process.stdin, flush=True)
                return float(process.stdout.readline())

            yield {f"SAELens: {name}": lambda name=name: once(name) for name in names}
            process.stdin.close()


def hooks(saes: list[SAE], activations: list[Tensor]) -> dict[str, Callable[[], float]]:
    """What attaching does in a forward, without the model: the difference of two forwards varies by more."""
    forward = attach._Forward(slice(1, None))
    forward.begin(torch.nn.Identity(), (), {"input_ids": activations[0][..., 0]})
    site = Site.parse(saes[0].metadata["site"])

    def run(edits: attach.Edits, error: bool) -> Callable[[], float]:
        made = (
            attach._parts(sae, site, attach._Wanted.of(sae, edits), error, attach.Count()) for sae in saes
        )
        parts = [part for (part,) in made]

        def all_of_them() -> None:
            for part, x_BLD in zip(parts, activations, strict=True):
                part.read(x_BLD, forward)
                part.write(site, forward, x_BLD)

        return lambda: timed(all_of_them)

    return {
        "hooks alone, four latents": run(EDITS, True),
        "hooks alone, error=False": run(EDITS, False),
        "hooks alone, a function of all latents": run(lambda f: 1.5 * f, True),
    }


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def measure(
    model: str, rounds: int, B: int, L: int, F: int, *, layers: tuple[int, ...] = LAYERS, peer: bool = False
) -> dict[str, float]:
    """Return the median seconds of each."""
    lm = LanguageModel.load(model, [Site.parse(f"resid_post.{n}") for n in layers], whole=True, device="cpu")
    ids_BL = torch.randint(3, lm.config.vocab_size, (B, L), generator=torch.Generator().manual_seed(0))
    x = {site.layer: x_BLD.flatten(0, 1) for site, x_BLD in lm.activations(ids_BL).items()}
    saes = [sae_at(layer, x[layer], F) for layer in layers]
    named = {"check_model": False}

    def forward(edits: object = None, **how: bool) -> Callable[[], float]:
        def run() -> float:
            with (
                nullcontext()
                if edits is None
                else monosemy.attached(lm, dict.fromkeys(saes, edits), **named | how)
            ):
                return timed(lambda: lm.model(input_ids=ids_BL, use_cache=False, logits_to_keep=1))

        return run

    def alone() -> float:
        return timed(
            lambda: [sae.decode(sae.encode(x[layer])) for sae, layer in zip(saes, layers, strict=True)]
        )

    turns = hooks(saes, [x[layer].view(B, L, -1) for layer in layers]) | {
        "forward": forward(),
        "attached, four latents": forward(EDITS),
        "attached, error=False": forward(EDITS, error=False),
        "attached, a function of all latents": forward(lambda f: 1.5 * f),
        "encode and decode alone": alone,
    }
    with peer_side(saes, ids_BL) if peer else nullcontext({}) as theirs:
        turns |= theirs
        found: dict[str, list[float]] = {name: [] for name in turns}
        for n in range(WARM + rounds):
            for name, run in turns.items():
                seconds = run()
                if n >= WARM:
                    found[name].append(seconds)
    return {name: median(seconds) for name, seconds in found.items()}


def show(found: dict[str, float]) -> None:
    plain = found["forward"]
    of_peer = found.get("SAELens: forward", 0.0)
    alone = found["encode and decode alone"]
    print(f"{'':42}  {'ms':>7}  {'added':>7}  share of encode and decode")
    for name, seconds in found.items():
        line = f"{name:42}  {1e3 * seconds:7.1f}"
        base = of_peer if name.startswith("SAELens") else 0 if name.startswith("hooks") else plain
        if name not in ("forward", "SAELens: forward", "encode and decode alone"):
            line += f"  {1e3 * (seconds - base):7.1f}  {(seconds - base) / alone:.2f}"
        print(line)


def attribution(model: str, tokens: int, F: int) -> None:
    """Print what `attribute` holds for its backward pass, beside what a short prompt foretells, and how much
    the process grows."""
    lm = LanguageModel.load(model, [Site.parse("resid_post.9")], whole=True, device="cpu")
    ids_L = torch.randint(3, lm.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sae = sae_at(9, next(iter(lm.activations(ids_L[None, :256]).values()))[0], F)
    short = monosemy.attribute(lm, sae, ids_L[:32], 5, check_model=False).saved_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = monosemy.attribute(lm, sae, ids_L, 5, check_model=False)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{tokens} tokens, one SAE of {F} latents at layer 9: {found.saved_bytes / 2**20:,.0f} MiB held")
    print(f"foretold by 32 tokens, {short / 32:,.0f} bytes each: {short / 32 * tokens / 2**20:,.0f} MiB")
    print(
        f"the process grew by {rise / 1024:,.0f} MiB; {len(found[sae].effects_N):,} active latents are kept"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    for name, value in (("rounds", 15), ("rows", 4), ("tokens", 128), ("latents", 4096), ("attribution", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    if args.attribution:
        attribution(args.model, args.attribution, args.latents)
        return
    show(measure(args.model, args.rounds, args.rows, args.tokens, args.latents, peer=args.peer))


if __name__ == "__main__":
    main()
