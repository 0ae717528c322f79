"""Sites on tiny random models of each family, cut loading, splicing,
and what `describe` says of good and bad names.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers as hf

from monosemy.lm import embedded
from monosemy.lm.info import Site, check_sites, describe
from monosemy.lm.model import LanguageModel, load_tokenizer
from monosemy.system.http import ModelUnreachable

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}
WINDOWED = {"head_dim": 8, "sliding_window": 5}
FULL, SLIDING = "full_attention", "sliding_attention"
CONFIGS = {
    "gpt_neox": hf.GPTNeoXConfig(**SMALL, bos_token_id=0, eos_token_id=0),
    "gpt2": hf.GPT2Config(**GPT2),
    "llama": hf.LlamaConfig(**GROUPED),
    "mistral": hf.MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": hf.Gemma2Config(**GROUPED, **WINDOWED),
    "gemma3": hf.Gemma3TextConfig(**GROUPED, **WINDOWED, layer_types=[SLIDING, SLIDING, FULL, SLIDING]),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "opt": hf.OPTConfig(**OPT, word_embed_proj_dim=16),
    "falcon": hf.FalconConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
MODULES = {  # as the model with its head names them; by default as its decoder does
    "gpt2": "transformer.h.1.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.1.mlp",
    "opt": "model.decoder.layers.1.fc1",
    "falcon": "transformer.h.1.mlp",
}
NAMES = [
    "resid_pre.0",
    "resid_pre.2",
    "resid_post.0",
    "resid_post.2",
    "mlp_out.1",
    "attn_out.1",
    "attn_out.0",
]
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # fresh norms and biases are ones and zeros: too kind to mistakes
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sites(family: str) -> list[Site]:
    return [Site.parse(name) for name in [*NAMES, MODULES.get(family, "layers.1.mlp")]]


@pytest.fixture(scope="module")
def cut(folder: Path, sites: list[Site]) -> LanguageModel:
    return LanguageModel.load(str(folder), sites, device="cpu")


@pytest.fixture(scope="module")
def whole(folder: Path, sites: list[Site]) -> LanguageModel:
    return LanguageModel.load(str(folder), [*sites, Site.parse("resid_post.3")], device="cpu", whole=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- reading


def test_what_is_captured_is_the_models_own_hidden_state(
    cut: LanguageModel, whole: LanguageModel, reference: hf.PreTrainedModel
) -> None:
    with torch.no_grad():
        # the last of them is after the final norm
        hidden = reference(IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert len(cut.layers) == 3 and len(hidden) == 5
    for lm in (cut, whole):
        found = lm.activations(IDS)
        assert found.keys() == set(lm.sites)
        for name, i in {"resid_pre.0": 0, "resid_pre.2": 2, "resid_post.0": 1, "resid_post.2": 3}.items():
            assert torch.equal(found[Site.parse(name)], hidden[i])
        assert all(lm.d_in(site) == x.shape[-1] and x.shape[:2] == IDS.shape for site, x in found.items())


def test_sublayers_add_up_to_the_layer(cut: LanguageModel) -> None:
    """TransformerLens' meaning: what the attention and the MLP add to the residual stream,
    after a second norm where there is one.
    """
    x = {str(site): activations for site, activations in cut.activations(IDS).items()}
    torch.testing.assert_close(
        x["resid_post.0"] + x["attn_out.1"] + x["mlp_out.1"], x["resid_pre.2"], rtol=0, atol=2e-6
    )


def test_a_module_path_reads_its_output(
    family: str, cut: LanguageModel, whole: LanguageModel, reference: hf.PreTrainedModel
) -> None:
    site = Site.parse(MODULES.get(family, "layers.1.mlp"))
    kept: list[torch.Tensor] = []
    module = (
        reference.get_submodule(site.path)
        if family in MODULES
        else reference.get_decoder().get_submodule(site.path)
    )
    with torch.no_grad(), module.register_forward_hook(lambda _, args, output: kept.append(output.clone())):
        reference(IDS, use_cache=False)
    expected = kept[0].view(*IDS.shape, -1)
    assert torch.equal(cut.activations(IDS)[site], expected) and torch.equal(
        whole.activations(IDS)[site], expected
    )


def test_attention_is_causal_and_windowed(
    family: str, cut: LanguageModel, reference: hf.PreTrainedModel
) -> None:
    """No mask is given: the same as a mask of ones, blind to the future,
    and to what lies before a sliding window.
    """
    last, first = IDS.clone(), IDS.clone()
    last[:, -1] = 5
    first[:, 0] = 5
    site = Site.parse("resid_post.0")
    x, x_last, x_first = (cut.activations(ids)[site] for ids in (IDS, last, first))
    assert torch.equal(x[:, :-1], x_last[:, :-1]) and not torch.equal(x[:, -1], x_last[:, -1])
    windowed = family in ("mistral", "gemma2", "gemma3")  # layer 0 of each sees 5 tokens
    assert torch.equal(x[:, 5:], x_first[:, 5:]) == windowed
    with torch.no_grad():
        masked = reference(
            IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True, use_cache=False
        ).hidden_states[1]
    torch.testing.assert_close(x, masked)


def test_gradients_and_modes_are_left_alone(cut: LanguageModel) -> None:
    (x, *_) = cut.activations(IDS).values()
    assert not x.requires_grad and not x.is_inference() and torch.is_grad_enabled()
    assert not any(p.requires_grad for p in cut.model.parameters()) and not cut.model.training


# --- splicing


def test_the_head_is_the_models_own(whole: LanguageModel, reference: hf.PreTrainedModel) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, whole.sites)
        logits = reference(IDS, use_cache=False).logits
        assert torch.equal(whole.logits(clean.hidden_BLD), logits)
        torch.testing.assert_close(whole.logits(clean.hidden_BLD[:, 4]), logits[:, 4])


def test_splicing_the_untouched_activation_is_bit_equal(whole: LanguageModel) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, whole.sites)
        logits = whole.logits(clean.hidden_BLD)
        for site, x in clean.activations.items():
            before = x.clone()
            assert torch.equal(whole.spliced(clean, site, x), logits), site
            assert not torch.equal(whole.spliced(clean, site, torch.zeros_like(x)), logits), site
            assert torch.equal(whole.spliced(clean, site, x), logits) and torch.equal(x, before), site
        assert torch.equal(whole.clean(IDS, []).hidden_BLD, clean.hidden_BLD)


def test_splicing_equals_a_run_with_the_change_made_by_hand(
    whole: LanguageModel, reference: hf.PreTrainedModel
) -> None:
    layer = whole.layers[2]
    index = next(name for name, module in whole.model.named_modules() if module is layer)
    with torch.inference_mode():
        clean = whole.clean(IDS, whole.sites)
        site = Site.parse("resid_post.2")
        replacement = clean.activations[site] * 0.5
        by_hand = reference.get_submodule(index).register_forward_hook(
            lambda _, args, output: (
                (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5
            )
        )
        with by_hand:
            expected = reference(IDS, use_cache=False).logits
        assert torch.equal(whole.spliced(clean, site, replacement), expected)


def test_layers_before_the_site_are_not_run(whole: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    for i, layer in enumerate(whole.layers):
        forward = type(layer).forward
        monkeypatch.setattr(
            layer,
            "forward",
            lambda *a, i=i, layer=layer, forward=forward, **k: (ran.append(i), forward(layer, *a, **k))[1],
        )
    expected = {
        "resid_pre.0": [0, 1, 2, 3],
        "resid_post.0": [1, 2, 3],
        "mlp_out.1": [1, 2, 3],
        "resid_post.2": [3],
        "resid_post.3": [],
    }
    with torch.inference_mode():
        clean = whole.clean(IDS, whole.sites)
        assert ran == [0, 1, 2, 3]
        for name, layers in expected.items():
            ran.clear()
            whole.run_from(clean, Site.parse(name), clean.activations[Site.parse(name)])
            assert ran == layers, name


def test_a_failing_run_leaves_no_stub_behind(whole: LanguageModel) -> None:
    with torch.inference_mode():
        clean = whole.clean(IDS, whole.sites)
        with pytest.raises(RuntimeError):
            whole.run_from(clean, Site.parse("resid_post.0"), torch.zeros(3, 12, 31))
        assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in whole.layers)


def test_reading_a_shallow_site_of_a_whole_model_runs_no_deep_layer(
    whole: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = LanguageModel(whole.model, [Site.parse("resid_post.0"), Site.parse("mlp_out.1")])
    expected = whole.activations(IDS)
    for layer in whole.layers[2:]:
        monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: pytest.fail("a deep layer ran"))
    for site, x in shallow.activations(IDS).items():
        assert torch.equal(x, expected[site])


# --- names


@pytest.mark.parametrize(
    ("name", "canonical", "folder_name"),
    [
        ("resid_post.3", "resid_post.3", "resid_post_layer_3"),
        ("blocks.3.hook_resid_post", "resid_post.3", "resid_post_layer_3"),
        ("blocks.0.hook_attn_out", "attn_out.0", "attn_out_layer_0"),
        ("blocks.12.hook_mlp_out", "mlp_out.12", "mlp_out_layer_12"),
        ("resid_mid.3", "resid_mid.3", "resid_mid_layer_3"),
        ("blocks.3.hook_resid_mid", "resid_mid.3", "resid_mid_layer_3"),
        ("blocks.3.mlp.hook_in", "mlp_in.3", "mlp_in_layer_3"),
        (
            "model.layers.3.mlp.down_proj",
            "model.layers.3.mlp.down_proj",
            "module_model_layers_3_mlp_down_proj",
        ),
        ("lm_head", "lm_head", "module_lm_head"),
    ],
)
def test_site_names(name: str, canonical: str, folder_name: str) -> None:
    site = Site.parse(name)
    assert str(site) == canonical and site.folder == folder_name and Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resid_post",
        "resid_post.x",
        "blocks.3.hook_q",
        "blocks.3.hook_mlp_in",
        "blocks.3.ln2.hook_normalized",
        "mlp_in",
        "resid_post.3 ",
        "../x",
        "resid_post.1.2",
    ],
)
def test_site_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=r"resid_post\.3"):
        Site.parse(name)


def test_sites_that_the_model_does_not_have(tmp_path: Path) -> None:
    hf.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path)
    info = describe(str(tmp_path))
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="0 to 3"):
            check_sites(info, [Site.parse(f"resid_post.{layer}")])
    check_sites(info, [Site.parse("resid_post.3"), Site.parse("lm_head")])
    with pytest.raises(ValueError, match=r"mlp\.down_proj"):  # the error lists what there is
        LanguageModel.load(str(tmp_path), [Site.parse("layers.1.mlp.dwon_proj")], device="cpu")
    with pytest.raises(ValueError, match="whole=True"):
        LanguageModel.load(str(tmp_path), [Site.parse("resid_post.1")], device="cpu").logits(
            torch.zeros(1, 32)
        )


def test_sublayers_that_add_the_residual_themselves_are_refused() -> None:
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    assert LanguageModel(bloom, [Site.parse("resid_post.1")]).d_in(Site.parse("resid_post.1")) == 32
    with pytest.raises(ValueError, match="takes and adds it itself"):
        LanguageModel(bloom, [Site.parse("mlp_out.1")])


def test_a_model_that_also_sees_is_read_through_its_text_decoder(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    model = hf.AutoModelForCausalLM.from_config(
        hf.Gemma3Config(text_config=GROUPED | WINDOWED, vision_config=vision, **tokens)
    ).eval()
    model.save_pretrained(tmp_path)
    assert describe(str(tmp_path)).num_layers == 4
    site, ids = Site.parse("resid_post.1"), IDS.clamp(max=80)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True, use_cache=False)
        assert torch.equal(
            LanguageModel.load(str(tmp_path), [site], device="cpu").activations(ids)[site],
            expected.hidden_states[2],
        )
        whole = LanguageModel.load(str(tmp_path), [site], device="cpu", whole=True)
        clean = whole.clean(ids, [site])
        assert torch.equal(whole.spliced(clean, site, clean.activations[site]), expected.logits)


# --- loading


def test_dtype_and_device(tmp_path: Path) -> None:
    hf.LlamaForCausalLM(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    site = Site.parse("resid_post.0")
    assert describe(str(tmp_path)).dtype == "bfloat16"
    assert LanguageModel.load(str(tmp_path), [site], device="cpu").dtype == torch.float32
    assert (
        LanguageModel.load(str(tmp_path), [site], device="cpu", dtype="bfloat16").activations(IDS)[site].dtype
        == torch.bfloat16
    )
    with pytest.raises(ValueError, match="float7"):
        LanguageModel.load(str(tmp_path), [site], dtype="float7")
    with pytest.raises(ValueError, match="device"):
        LanguageModel.load(str(tmp_path), [site], device="cuda:99")


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, tie_word_embeddings=False)).save_pretrained(
        tmp_path / "whole"
    )
    weights = tmp_path / "whole" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(
        {name: w for name, w in load_file(weights).items() if "lm_head" not in name},
        weights,
        metadata={"format": "pt"},
    )
    LanguageModel.load(str(tmp_path / "whole"), [Site.parse("resid_post.1")], device="cpu")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        LanguageModel.load(str(tmp_path / "whole"), [Site.parse("resid_post.1")], device="cpu", whole=True)


def test_loading_takes_the_memory_of_the_needed_layers_and_one_shard(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=64, num_attention_heads=4, intermediate_size=1024
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    model.to_empty(device="cpu").save_pretrained(tmp_path, max_shard_size="10MB")
    hf.LlamaForCausalLM(CONFIGS["llama"]).save_pretrained(tmp_path / "warm")
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    script = """
        import sys
        from monosemy.lm.info import Site
        from monosemy.lm.model import LanguageModel
        def peak():
            lines = open("/proc/self/status")
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        LanguageModel.load(sys.argv[2], [Site.parse("resid_post.1")], device="cpu")  # imports and caches
        before = peak()
        lm = LanguageModel.load(sys.argv[1], [Site.parse("resid_post.3")], device="cpu")
        print(peak() - before, len(lm.layers))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path, tmp_path / "warm"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    growth, layers = map(int, run.stdout.split())
    embedding = 512 * 256 * 4
    assert layers == 4 and growth <= 4 * layer + embedding + shard, (growth / 1e6, layer / 1e6, shard / 1e6)
    assert 64 * layer > 4 * (4 * layer + embedding + shard)  # the whole model would be seen


# --- describe


def test_describe_estimates_parameters(family: str, folder: Path, reference: hf.PreTrainedModel) -> None:
    info = describe(str(folder))
    assert (info.num_layers, info.d_model, info.vocab_size) == (4, 32, 97)
    exact = sum(p.numel() for p in reference.parameters())
    assert info.parameters() == pytest.approx(exact, rel=0.15) and info.parameters(2) < info.parameters()


def run_describe(names: list[str], **environment: str) -> list[str]:
    """What describe says of names, in a process of its own;
    the last line says which heavy modules it imported.
    """
    script = """
        import sys
        from monosemy.lm.info import Site, check_sites, describe
        for name in sys.argv[1:]:
            try:
                info = describe(name)
                check_sites(info, [Site.parse("resid_post.0")])
                print(info.model_type, info.num_layers, info.revision, info.offline)
            except ValueError as error:
                print(type(error).__name__, error)
        print("heavy:", *{"torch", "transformers", "numpy"} & sys.modules.keys())
    """
    environment = os.environ | environment
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout.splitlines()


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for config.json as a model hub would."""

    config = json.dumps(
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 5, "n_embd": 32, "n_head": 4}
    ).encode()
    answers: ClassVar = {
        "gated": (403, {"X-Error-Code": "GatedRepo"}),
        "nobody": (404, {"X-Error-Code": "RepoNotFound"}),
        "bare": (404, {"X-Error-Code": "EntryNotFound"}),
        "broken": (503, {}),
        "good": (200, {"ETag": '"abc"', "X-Repo-Commit": "1" * 40}),
    }

    def do_HEAD(self) -> None:
        status, headers = self.answers.get(self.path.split("/")[1], (404, {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.config) if status == 200 else 0))
        self.end_headers()
        if self.command == "GET" and status == 200:
            self.wfile.write(self.config)

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_hubs_answers(hub: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    names = ["gated/model", "nobody/model", "bare/model", "broken/model", "good/model"]
    gated, nobody, bare, broken, good, heavy = run_describe(names, **environment)
    assert "https://huggingface.co/gated/model" in gated and "`hf auth login`" in gated
    assert "https://huggingface.co/nobody/model" in nobody and "smollm2-135m" in nobody
    assert "no config.json" in bare
    assert broken.startswith("ModelUnreachable") and "503" in broken and "--model_name smollm2-135m" in broken
    assert good == f"gpt2 5 {'1' * 40} False"
    assert heavy == "heavy:"
    # A hub that is gone: what is in the cache serves, and anything else is refused at once.
    hub.shutdown()
    hub.server_close()
    cached, missing, _ = run_describe(["good/model", "good/other"], **environment)
    assert cached == f"gpt2 5 {'1' * 40} True"
    assert missing.startswith("ModelUnreachable") and "good/other" in missing and "local folder" in missing
    assert issubclass(ModelUnreachable, ConnectionError)


def test_names_that_need_no_hub(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, config in {
        "encoder": {"architectures": ["BertForMaskedLM"], "num_hidden_layers": 2, "hidden_size": 8},
        "both": {
            "architectures": ["T5ForConditionalGeneration"],
            "is_encoder_decoder": True,
            "num_layers": 2,
            "d_model": 8,
        },
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    names = ["smollm2-135m", *(str(tmp_path / name) for name in ("empty", "encoder", "both", "torn", "none"))]
    default, empty, encoder, both, torn, none, heavy = run_describe(
        names, MONOSEMY_CACHE=str(tmp_path / "cache")
    )
    assert default == "llama 30 None False"  # before it was ever built
    assert "config.json" in empty and "BertForMaskedLM" in encoder and "T5ForConditionalGeneration" in both
    assert "not JSON" in torn and "there is none" in none
    assert heavy == "heavy:"


# --- the real model


def test_the_embedded_model_and_its_sink() -> None:
    """From layer 12 on, SmolLM2's position 0 has a residual norm near 22,700, against a median of 133."""
    info = describe("smollm2-135m")
    site = Site.parse("resid_post.12")
    lm = LanguageModel.load("smollm2-135m", [site], device="cpu")
    assert len(lm.layers) == 13 and lm.d_in(site) == info.d_model == 576
    tokenizer = load_tokenizer("smollm2-135m")
    text = (
        "The president spoke of the state of the union, of trade and of peace, and thanked the people for "
        "their patience. " * 3
    )
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    norms = lm.activations(ids)[site].norm(dim=-1)[0]
    assert 20_000 < norms[0] < 25_000
    assert 80 < norms[1:].median() < 200 and norms[1:].max() < 10 * norms[1:].median()
    assert norms.mean() > 2 * norms[1:].mean()  # left in, the one position swamps every mean
    assert (
        info.num_layers
        == json.loads((embedded.model_folder() / "config.json").read_text())["num_hidden_layers"]
    )
