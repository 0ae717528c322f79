"""What report.html is made of: the statistics of latents, which of them get pages, and the page as a file.
`make peers` opens it in a browser."""

import base64
import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from monosemy.cli import main
from monosemy.config import architecture_names
from monosemy.evaluation import geometry, latent_stats, latents
from monosemy.evaluation.latent_stats import (
    BEFORE,
    LOWEST,
    OCTAVES,
    SAMPLED,
    STRONGEST,
    WINDOW,
    LatentStats,
)
from monosemy.jobs import memory
from monosemy.lm.info import Site
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.report import page
from monosemy.report.drawing import MATPLOTLIB_MARKERS
from monosemy.report.looks import MARKERS, looks
from monosemy.sae import architecture
from tests.made_run import HOSTILE, KINDS, make

C, L, F = 60, 16, 40


# --- gathering


@pytest.fixture(scope="module")
def codes():
    """Codes of counted tokens with many ties, [N, F], over several octaves; a silent latent, one always on;
    and their places."""
    draw = torch.Generator().manual_seed(0)
    f_NF = torch.relu(torch.randn(C * L, F, generator=draw) - 1.2) * torch.exp(
        1.5 * torch.randn(C * L, F, generator=draw)
    )
    f_NF = (f_NF * 16).round() / 16
    f_NF[:, 0], f_NF[:, 1] = 0, 1
    f_NF[:, 2:6] *= torch.rand(C * L, 4, generator=draw) < 0.03
    at_N = (torch.rand(C * L, generator=draw) < 0.9).nonzero()[:, 0]
    return f_NF[at_N], at_N


def gathered(codes, parts=C, shuffled=False, seed=0):
    f_NF, at_N = codes
    g = LatentStats(F, L, seed=seed, salt="x")
    groups = list(torch.arange(C).split(parts))
    for group in (
        [groups[i] for i in torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
        if shuffled
        else groups
    ):
        mine = torch.isin(at_N // L, group)
        g.add(f_NF[mine], at_N[mine])
    return g


def tensors(g):
    kept = [
        getattr(k, name) for k in (g.top, g.sampled) for name in ("key_SR", "at_SR", "peak_SR", "window_SRW")
    ]
    kept += [g.silent.key_FR, g.silent.at_FR]
    return [
        g.histogram.count_F,
        g.contexts_F,
        g.histogram.max_F,
        g.histogram.bins_FH,
        g.sampled.octave_S,
        g.sampled.candidates_S,
        *kept,
    ]


def test_statistics_equal_a_recount(codes):
    f_NF, at_N = codes
    g = gathered(codes)
    assert g.tokens == len(at_N) and g.contexts == C
    assert g.histogram.count_F.equal((f_NF > 0).sum(0)) and g.histogram.max_F.equal(f_NF.amax(0))
    torch.testing.assert_close(g.histogram.sum_F, f_NF.double().sum(0))
    for latent in range(F):
        active = f_NF[:, latent] > 0
        values, places = f_NF[active, latent], at_N[active]
        assert g.contexts_F[latent] == len(set((places // L).tolist()))
        edges = [2.0 ** (LOWEST + b // 4) * (1 + b % 4 / 4) for b in range(latent_stats.BINS + 1)]
        assert g.histogram.bins_FH[latent].tolist() == np.histogram(values.numpy(), edges)[0].tolist()


def test_the_strongest_contexts_and_the_drawn_ones_equal_brute_force(codes):
    f_NF, at_N = codes
    g = gathered(codes)
    where = {place: row for row, place in enumerate(at_N.tolist())}
    for latent in range(F):
        best = {}
        for place, value in zip(at_N.tolist(), f_NF[:, latent].tolist(), strict=True):
            if value > 0 and value > best.get(place // L, (0, 0))[0]:
                best[place // L] = (value, place)
        ranked = sorted(best.values(), key=lambda peak: (-peak[0], peak[1]))
        expected = [place for _, place in ranked[:STRONGEST]]
        assert g.top.at_SR[latent].tolist() == expected + [-1] * (STRONGEST - len(expected))
        for slot, (peak, place) in enumerate(ranked[:STRONGEST]):
            near = [place - BEFORE + i for i in range(WINDOW)]
            values = [
                f_NF[where[n], latent].item() if n in where and n // L == place // L else 0 for n in near
            ]
            assert g.top.window_SRW[latent, slot].tolist() == [
                int(np.ceil(np.float32(255) * np.float32(v) / peak)) for v in values
            ]
        top = max((int(np.floor(np.log2(value))) for value, _ in ranked), default=0)
        for octave in range(top - OCTAVES + 1, top + 1):
            inside = {place for value, place in ranked if np.floor(np.log2(value)) == octave}
            slot = latent * OCTAVES + octave % OCTAVES
            if inside:
                kept = [at for at in g.sampled.at_SR[slot].tolist() if at >= 0]
                assert g.sampled.octave_S[slot] == octave and g.sampled.candidates_S[slot] == len(inside)
                assert set(kept) <= inside and len(kept) == min(SAMPLED, len(inside))


def test_silent_windows_are_those_in_which_nothing_fires(codes):
    """And all that a context offered are there where they are fewer than are kept."""
    f_NF, at_N = codes
    g = gathered(codes)
    for latent in range(F):
        fired = at_N[f_NF[:, latent] > 0]
        kept = [at for at in g.silent.at_FR[latent].tolist() if at >= 0]
        assert len({at // L for at in kept}) == len(kept) and all(at % L for at in kept)
        for at in kept:
            near = (fired // L == at // L) & (fired >= at - BEFORE) & (fired < at - BEFORE + WINDOW)
            assert not near.any()
        silent = C - len(set((fired // L).tolist()))
        assert len(kept) >= min(silent, latent_stats.SILENT)
    assert len({tuple(row) for row in g.silent.at_FR[2:6].tolist()}) == 4


@pytest.mark.parametrize(("parts", "shuffled"), [(1, False), (7, False), (1, True), (7, True)])
def test_neither_order_nor_batch_size_shows(codes, parts, shuffled):
    assert all(
        a.equal(b)
        for a, b in zip(tensors(gathered(codes)), tensors(gathered(codes, parts, shuffled)), strict=True)
    )


def test_many_entries_are_taken_in_pieces(codes, monkeypatch):
    whole = tensors(gathered(codes))
    monkeypatch.setattr(latent_stats, "ENTRIES", 50)
    assert all(a.equal(b) for a, b in zip(whole, tensors(gathered(codes)), strict=True))


def test_another_seed_draws_others(codes):
    a, b = gathered(codes), gathered(codes, seed=1)
    assert a.top.at_SR.equal(b.top.at_SR) and not a.sampled.at_SR.equal(b.sampled.at_SR)


def test_memory_is_what_is_said(codes):
    g = gathered(codes)
    held = sum(t.nbytes for t in tensors(g)) + g.histogram.sum_F.nbytes
    assert held == latent_stats.state_bytes(F) == memory.GATHERED * F


# --- decoders, logits, choice


def planted(d_in=24, d_sae=48):
    sae = architecture("standard")(d_in, d_sae)
    sae.reset(torch.Generator().manual_seed(0))
    return sae


def test_planted_copies_are_found():
    sae = planted()
    before = geometry.geometry(sae).columns()
    sae.W_dec.data[7] = 3 * sae.W_dec.data[30]
    sae.W_dec.data[9] = (
        sae.W_dec.data[11] + 0.3 * sae.W_dec.data[12] * sae.W_dec.data[11].norm() / sae.W_dec.data[12].norm()
    )
    near_F, cosine_F, mean_F = geometry.nearest(sae.W_dec)
    unit_FD = sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True)
    others_FF = (unit_FD @ unit_FD.T).abs().fill_diagonal_(0)
    torch.testing.assert_close(mean_F.double(), others_FF.sum(1) / (len(unit_FD) - 1), atol=1e-6, rtol=1e-4)
    assert near_F[7] == 30 and near_F[30] == 7 and cosine_F[7] == pytest.approx(1)
    after = geometry.geometry(sae).columns()
    assert (before["copies"], before["near_copies"]) == (0, 0) and (
        after["copies"],
        after["near_copies"],
    ) == (2, 4)
    ids, cosines = geometry.neighbors(sae, torch.tensor([7, 0]), 3)
    assert ids[0, 0] == 30 and 0 not in ids[1] and (cosines.diff(dim=1) <= 0).all()
    assert before["encoder_decoder_cosine"] == pytest.approx(1)
    sae.W_dec.data.fill_(torch.nan)
    assert geometry.geometry(sae).columns()["decoder_max_cosine"] is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_decoder_that_writes_one_token_promotes_it(kind):
    import transformers as hf

    size = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "head_dim": 16,
    }
    made = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**size, tie_word_embeddings=False)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**size, num_key_value_heads=1)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made[kind]()
        lm = LanguageModel(model, [Site.parse("resid_post.0")])
        norm = next(m for m in lm.decoder.children() if m is not lm.layers and "Norm" in type(m).__name__)
        norm.weight.data.copy_(torch.randn(32).exp())  # for Gemma the gain is one more
        W_VD = lm.model.get_output_embeddings().weight.data.copy_(torch.randn(200, 32))
    gain_D = norm.weight.data + (kind == "gemma2")
    rows_PD = W_VD[[17, 50, 99]] / gain_D
    masked_V = torch.zeros(200, dtype=torch.bool)
    up, z, _, down_z = geometry.logit_effects(rows_PD, lm, masked_V)
    if kind != "gpt2":  # a centered row is not quite that token's
        assert up[:, 0].tolist() == [17, 50, 99]
    centered_PD = rows_PD - rows_PD.mean(1, keepdim=True) if kind == "gpt2" else rows_PD
    effect_PV = (centered_PD * gain_D) @ W_VD.T
    effect_PV = (effect_PV - effect_PV.mean(1, keepdim=True)) / effect_PV.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(z, effect_PV.topk(10).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(down_z, effect_PV.topk(10, largest=False).values, rtol=1e-3, atol=1e-3)
    masked_V[up[0, 0]] = True
    assert up[0, 0] not in geometry.logit_effects(rows_PD, lm, masked_V)[0][0]


def test_pages_are_chosen_fairly(codes):
    g, sae = gathered(codes), planted(8, F)
    like, entropy_F = geometry.geometry(sae), torch.zeros(F, dtype=torch.float64)
    chosen, reasons = latents.choose(g, like, 15, entropy_F)
    # a latent that never fired has no page
    assert len(set(chosen.tolist())) == len(chosen) == 15 and 0 not in chosen
    random = set(chosen[reasons == 0].tolist())
    assert len(random) == 5 and all(g.contexts_F[latent] >= latents.RARE_CONTEXTS for latent in random)
    assert (reasons[:8] == 0).sum() in (2, 3)  # so a report that keeps fewer pages keeps the shares
    other = geometry.Geometry(
        like.near_F.roll(3), like.near_cosine_F.flip(0), like.mean_cosine_F, -like.enc_dec_F
    )
    turned = latents.choose(g, other, 15, entropy_F + 1)
    assert random == set(turned[0][turned[1] == 0].tolist())  # the draw knows nothing of the weights
    everyone, _ = latents.choose(g, like, 1000, entropy_F)
    assert sorted(everyone.tolist()) == [latent for latent in range(F) if g.histogram.count_F[latent]]


def test_entropy_is_of_the_kinds_of_tokens():
    tokens = torch.tensor([[5, 5, 5, 5], [1, 2, 3, 4], [1, 1, 2, -1], [-1, -1, -1, -1]])
    expected = [0, 2, -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)), 0]
    assert latents.peak_entropy(tokens).tolist() == pytest.approx(expected)


def test_tokens_are_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer("smollm2-135m")
    text = "naïve “quotes” שלום 👩‍👩‍👧 \t\n<|im_start|>x"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(latents.token_bytes(tokenizer, ids)).decode() == text
    pieces = Tokenizer(models.WordLevel({"\u2581the": 0, "<0xE2>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    pieces.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    assert latents.token_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces), [0, 1, 2]) == [
        b" the",
        b"\xe2",
        b"a",
    ]


# --- the page as a file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "made"
    folder.mkdir()
    return folder, make(folder)


def unpacked(text, name):
    layout = json.loads(
        re.search(r'<script type="application/json" id="layouts">(.*?)</script>', text, re.S)[1]
    )[name]
    block = re.search(
        rf'<script type="application/octet-stream" id="block-{name}">(.*?)</script>', text, re.S
    )[1]
    raw, columns = gzip.decompress(base64.b64decode(block)), {}
    for column, kind, shape, first in layout:
        size, count = int(kind[1]), int(np.prod(shape))
        planes = np.frombuffer(raw, np.uint8, count * size, first).reshape(size, count)
        columns[column] = planes.T.copy().view(kind).reshape(shape)
    return columns


def test_the_page_is_whole_by_itself(made):
    text = page.write([made[0]]).read_text()
    assert re.match(
        r'<!doctype html>\s*<html lang="en">\s*<head>\s*<meta http-equiv="Content-Security-Policy" '
        r'content="default-src \'none\';',
        text,
    )
    ours = text.split("</head>")[0] + text.split("<body>")[1].split("<script")[0]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", ours)
    assert len(text) < 2_000_000
    assert len(re.findall(r"</script", text)) == len(re.findall(r"<script", text.split("<script>")[0])) + 2


def test_our_script_makes_no_markup_of_strings():
    from importlib.resources import files

    scripts = list((files("monosemy.report") / "script").iterdir())
    assert {Path(file.name).stem for file in scripts} == set(page.SCRIPTS)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser",
        page.script(),
    )


def test_hostile_words_stay_text(made):
    folder, rows = made
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"site": "<script>alert(1)</script>{{ 7*7 }}"}) + "\n" for row in rows)
    )
    try:
        text = page.write([folder]).read_text()
    finally:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in text
    assert "<b>made</b>" not in text and "&lt;b&gt;made&lt;/b&gt; text" in text
    assert all(word.decode() not in text for word in HOSTILE[:2])
    assert unpacked(text, "text0")["token_bytes"].tobytes().startswith(HOSTILE[0])


def test_the_table_says_what_the_rows_say(made):
    folder, rows = made
    text = page.write([folder]).read_text()
    table = re.search(r'<table id="saes">(.*?)</table>', text, re.S)[1]
    found = re.findall(r'<tr data-number="(\d+)">(.*?)</tr>', table, re.S)
    assert len(found) == len(rows) == 16
    digits = {"l0": 1, "kl": 4, "fvu": 4, "ce_diff": 4, "cossim": 4, "encoder_decoder_cosine": 3}
    for (number, cells), row in zip(found, rows, strict=True):
        assert rows[int(number)] is row
        shown = {
            k: html.unescape(re.sub(r"<[^>]+>", "", cell))
            for k, cell in re.findall(r'<td [^>]*data-key="(\w+)"[^>]*>(.*?)</td>', cells, re.S)
        }
        for key, places in digits.items():
            star = "*" if key == "fvu" and row["threshold_flag"] else ""
            assert shown[key] == ("-" if row[key] is None else f"{row[key]:.{places}f}{star}")
        for key in ("never_fired", "dense", "always_on", "near_copies", "copies"):
            assert shown[key] == str(row[key])
        low, high = row["loss_recovered_zero_low"], row["loss_recovered_zero_high"]
        interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
        assert shown["loss_recovered_zero"] == f"{row['loss_recovered_zero']:.4f}{interval}"


def test_blocks_hold_the_arrays(made):
    folder, rows = made
    text = page.write([folder]).read_text()
    overview = json.loads(unpacked(text, "overview")["json"].tobytes())
    assert [sae["row"]["fvu"] for sae in overview["saes"]] == [row["fvu"] for row in rows]
    for number in (0, 15):
        with np.load(folder / rows[number]["sae"] / "latents.npz") as file:
            packed = unpacked(text, f"sae{number}")
            for name in (
                "count",
                "contexts",
                "near",
                "peak_token",
                "page_latent",
                "page_bins",
                "page_promotes",
                "page_candidates",
            ):
                assert (packed[name] == file[name]).all(), name
            for name in ("max", "mean", "page_peak", "page_promotes_z"):
                np.testing.assert_allclose(packed[name], file[name], rtol=2.0**-12)
            np.testing.assert_allclose(packed["enc_dec"] / 100, file["enc_dec"], atol=0.0051)
            with np.load(folder / "eval_text.npz") as whole:  # places moved with the contexts that are kept
                table, at = unpacked(text, "text0"), file["page_at"]
                same = table["ids"].ravel()[packed["page_at"][at >= 0]]
                assert (table["token_ids"][same] == whole["ids"].ravel()[at[at >= 0]]).all()


def test_a_file_that_grows_too_large_keeps_fewer_pages(made, monkeypatch):
    folder, _ = made
    full = page.write([folder]).stat().st_size
    assert page.write([folder], latents=3).stat().st_size < full
    monkeypatch.setattr(page, "LIMIT", full - 2000)
    text = page.write([folder]).read_text()
    assert len(text.encode()) <= full - 2000
    assert 0 < len(unpacked(text, "sae0")["page_latent"]) < 24 and len(unpacked(text, "sae0")["count"]) == 64
    monkeypatch.setattr(page, "LIMIT", 1000)
    with pytest.raises(page.DoesNotFit, match="fewer runs"):
        page.write([folder])


def test_runs_side_by_side_are_told_apart(made, tmp_path, capsys):
    other = tmp_path / "x" / "made"
    other.mkdir(parents=True)
    make(other, sites=1, seed=1)
    text = page.write([made[0], other], tmp_path / "both.html").read_text()
    assert (
        text.count("<tr data-number") == 24
        and "x/made" in text
        and {"text0", "text1", "sae23"} <= set(re.findall(r'id="block-(\w+)"', text))
    )
    assert main(["report", str(made[0]), str(made[0])]) == main(["report"]) == 2
    assert "each folder once" in capsys.readouterr().err


def test_every_architecture_has_a_look_of_its_own():
    assert set(architecture_names()) == set(looks()) >= set(KINDS)
    assert set(MARKERS) == set(MATPLOTLIB_MARKERS)
    assert len({look[2] for look in looks().values()}) == len(looks()) and {
        look[2] for look in looks().values()
    } <= set(MARKERS)

    def contrast(a, b):
        def light(color):
            parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            return sum(
                w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
                for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
            )

        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert all(
        contrast(light, "#ffffff") >= 3 and contrast(dark, "#14171a") >= 3
        for light, dark, *_ in looks().values()
    )


# --- a whole run


@pytest.fixture(scope="module")
def run(tiny_model, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "small"
    flags = (
        "--layers 1 --architectures batch_top_k standard --dictionary_widths 48 --num_tokens 1280 "
        "--sae_batch_size 64 --context_length 32"
    )
    flags += (
        " --target_l0s 4 --standard_penalties 0.01 --held_out_fraction 0.1 --eval_num_inputs 20 "
        "--eval_spliced_inputs 4 --report_latents 20"
    )
    command = [
        "train",
        "--save_dir",
        str(folder),
        "--model_name",
        str(tiny_model),
        "--dataset",
        str(text_file),
        *flags.split(),
    ]
    assert main(command) == 0
    return folder


def test_a_run_ends_with_its_report(run, tiny_model):
    text = (run / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert "This run is" not in text and len(rows) == 2
    table, tokenizer = unpacked(text, "text0"), load_tokenizer(str(tiny_model))
    for number, row in enumerate(rows):
        packed = unpacked(text, f"sae{number}")
        assert (packed["count"] == 0).sum() == row["never_fired"]
        assert packed["count"].sum() == pytest.approx(row["l0"] * row["tokens"])
        assert {"near_copies", "copies", "dense", "always_on", "encoder_decoder_cosine"} <= row.keys()
        assert 0 < len(packed["page_latent"]) <= 20
        # the strongest context's peak is the index's peak token
        at, latent = (
            packed["page_at"][0, 0],
            packed["page_latent"][0],
        )
        place = table["ids"].ravel()[at]
        assert table["token_ids"][place] == packed["peak_token"][latent]
        spelled = (
            table["token_bytes"]
            .tobytes()[table["token_lengths"][:place].sum() :][: table["token_lengths"][place]]
            .decode()
        )
        assert spelled.strip() == tokenizer.convert_ids_to_tokens(int(packed["peak_token"][latent]))
        assert packed["page_promotes"].shape == (len(packed["page_latent"]), 10)


def test_a_report_without_text_holds_none(run, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text())
    facts["config"]["report_text"] = False
    (folder / "run.json").write_text(json.dumps(facts))
    assert main(["eval", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "ids" not in np.load(folder / "eval_text.npz").files and not unpacked(text, "text0")["ids"].size
    assert not {"page_at", "page_shade", "peak_token"} & unpacked(text, "sae0").keys()
    facts["config"]["report_latents"] = 0
    (folder / "run.json").write_text(json.dumps(facts))
    assert main(["eval", str(folder)]) == 0
    assert "block-sae0" not in (folder / "report.html").read_text() and not list(
        folder.glob("*/*/latents.npz")
    )
