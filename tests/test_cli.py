"""Flags and refusals. All bad configurations share this process; each is refused before weights load and
writes nothing."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monosemy.cli import main
from monosemy.config import TrainConfig

ROOT = Path(__file__).parents[1]
SEED_COMMANDS = [
    "--save_dir saes --model_name EleutherAI/pythia-70m-deduped --layers 3 --architectures standard "
    "jump_relu batch_top_k top_k gated",
    "--save_dir saes --model_name Qwen/Qwen2.5-Coder-32B-Instruct --layers 32 --architectures batch_top_k "
    "--use_wandb --hf_repo_id me/saes --mixed_dataset",
    "--save_dir saes --model_name Qwen/Qwen3-8B --layers 9 18 27 --architectures batch_top_k --hf_repo_id "
    "me/saes --mixed_dataset --use_wandb",
    "--save_dir topk --model_name google/gemma-2-2b --layers 12 --architectures top_k",
]
# flags, what the error must name, the value, a word of the remedy
BAD = [
    ("--layers 3", "layers", "3", "Count layers from 0"),
    ("--layers -1", "layers", "-1", "Count layers from 0"),
    ("--layers", "layers", "()", "--layers 3"),
    ("--architectures topk", "architectures", "topk", "batch_top_k"),
    ("--architectures top_k top_k", "architectures", "top_k", "repeated"),
    ("--target_l0s 100", "target_l0s", "100", "up to 48"),
    ("--target_l0s 0", "target_l0s", "0", "above 0"),
    ("--target_l0s -5", "target_l0s", "-5", "above 0"),
    ("--dictionary_widths 0", "dictionary_widths", "0", "1 or more"),
    ("--dictionary_widths -16", "dictionary_widths", "-16", "1 or more"),
    ("--learning_rates 0", "learning_rates", "0", "above 0"),
    ("--learning_rates nan", "learning_rates", "nan", "above 0"),
    ("--learning_rates inf", "learning_rates", "inf", "above 0"),
    ("--architectures standard --standard_penalties -1", "standard_penalties", "-1", "above 0"),
    ("--architectures gated --gated_penalties", "gated_penalties", "()", "at least one"),
    ("--num_tokens 0", "num_tokens", "0", "1 or more"),
    ("--num_tokens 10", "num_tokens", "10", "one batch"),
    ("--sae_batch_size 0", "sae_batch_size", "0", "1 or more"),
    ("--llm_batch_size -2", "llm_batch_size", "-2", "1 or more"),
    ("--buffer_tokens 0", "buffer_tokens", "0", "1 or more"),
    ("--eval_num_inputs 0", "eval_num_inputs", "0", "1 or more"),
    ("--log_steps 0", "log_steps", "0", "1 or more"),
    ("--context_length 1", "context_length", "1", "2 or more"),
    ("--context_length 4096", "context_length", "4096", "up to 128"),
    ("--warmup_steps 1000", "warmup_steps", "1000", "shorten"),
    ("--warmup_steps -1", "warmup_steps", "-1", "0 or more"),
    ("--sparsity_warmup_steps 100", "sparsity_warmup_steps", "100", "shorten"),
    ("--decay_start_fraction 1.5", "decay_start_fraction", "1.5", "share"),
    ("--pretrain_frac -0.1 --mixed_dataset", "pretrain_frac", "-0.1", "share"),
    ("--system_prompt_removal_freq 2", "system_prompt_removal_freq", "2", "share"),
    ("--held_out_fraction 0", "held_out_fraction", "0", "above 0"),
    ("--held_out_fraction 1.2", "held_out_fraction", "1.2", "share"),
    ("--threshold_beta 3", "threshold_beta", "3", "share"),
    ("--bandwidth 0", "bandwidth", "0", "above 0"),
    ("--sparsity_penalty -1", "sparsity_penalty", "-1", "above 0"),
    ("--auxk_alpha -1", "auxk_alpha", "-1", "0 or more"),
    ("--max_activation_norm_multiple -1", "max_activation_norm_multiple", "-1", "0 or more"),
    ("--dead_feature_threshold -1", "dead_feature_threshold", "-1", "0 or more"),
    ("--device tpu", "device", "tpu", "cuda"),
    ("--hf_repo_id nobody", "hf_repo_id", "nobody", "OWNER/NAME"),
    ("--init_from {tmp}", "init_from", "", "trained SAE"),
    ("--dataset {tmp}/none.jsonl", "dataset", "none.jsonl", ""),
    ("--dataset {text} --text_key body", "text_key", "body", ""),
    ("--model_name {tmp}", "model_name", "", "config.json"),
    ("--model_name no/such/model", "model_name", "no/such/model", ""),
    ("--sites resid_middle.1", "site", "resid_middle.1", "resid_post"),
    ("--sites mlp_out.9", "layers", "9", "0 to 2"),
    ("--save_dir {tmp}/file.txt", "save_dir", "file.txt", "folder"),
    ("--save_dir {tmp}/full", "save_dir", "full", "other files"),
    ("--save_dir /proc/saes", "save_dir", "/proc/saes", "written"),
]


@pytest.mark.parametrize(("flags", "field", "value", "remedy"), BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_refused_at_once(
    flags, field, value, remedy, tiny_model, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    base = (
        f"train --save_dir {tmp_path}/run --model_name {tiny_model} --dataset {text_file} --layers 1 "
        "--architectures top_k --dictionary_widths 48 --num_tokens 6400 --sae_batch_size 64 --target_l0s 4"
    )
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    start = time.monotonic()
    try:
        code = main([*base.split(), *flags.format(tmp=tmp_path, text=text_file).split()])
    except SystemExit as leave:  # the parser's own
        code = leave.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert field in error and value in error and remedy in error, error
    assert time.monotonic() - start < 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_module_that_is_not_there_is_told_before_weights_load(
    tiny_model, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    base = (
        f"train --save_dir {tmp_path}/run --model_name {tiny_model} --dataset {text_file} "
        "--dictionary_widths 48 --num_tokens 6400"
    )
    flags = "--sae_batch_size 64 --target_l0s 4 --sites model.layers.1.gate"
    assert main([*base.split(), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "model.layers.1.gate" in error and "self_attn" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", ["--num_tokens many", "--layers x", "--no_such_flag 3", "--dtype int8", "--recipe mine"]
)
def test_flags_that_do_not_parse(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        main(["train", "--save_dir", str(tmp_path / "run"), *flags.split()])
    assert leave.value.code == 2
    assert flags.split()[0].removeprefix("--") in capsys.readouterr().err


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_the_reference_s_commands_end_within_seconds_without_the_hub(command, tmp_path):
    """Verbatim, one after the other would be: each names what it could not reach, and writes nothing."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and time.monotonic() - start < 20
    model = command.split()[3]
    assert model in done.stderr and "could not be reached" in done.stderr and "local folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in tmp_path.iterdir() if p.name != "hf"]


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_the_reference_s_commands_parse_and_plan_where_the_model_is_known(
    command, tmp_path, capsys, monkeypatch, text_file
):
    """With the models' config.json and a local text in the place of the hub's: the presets, the grid, the
    budget."""
    from monosemy.jobs import plan, sites

    shapes = {
        "EleutherAI/pythia-70m-deduped": ("GPTNeoX", 6, 512),
        "Qwen/Qwen2.5-Coder-32B-Instruct": ("Qwen2", 64, 5120),
        "Qwen/Qwen3-8B": ("Qwen3", 36, 4096),
        "google/gemma-2-2b": ("Gemma2", 26, 2304),
    }
    args = command.split()
    name, (kind, layers, width) = args[3], shapes[args[3]]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [f"{kind}ForCausalLM"],
                "num_hidden_layers": layers,
                "hidden_size": width,
                "vocab_size": 1000,
                "num_attention_heads": 8,
            }
        )
    )
    real = plan.describe
    monkeypatch.setattr(plan, "describe", lambda model, revision=None: real(str(folder)))
    monkeypatch.setattr(sites, "check_weights", lambda info: None)  # there are none
    monkeypatch.setattr(plan, "check_sources", lambda config: None)
    monkeypatch.chdir(tmp_path)
    assert main(["train", *args, "--dry_run"]) == 0
    out = capsys.readouterr().out
    grid = {"EleutherAI/pythia-70m-deduped": 36, "Qwen/Qwen3-8B": 12}.get(name, 4)
    assert f"{grid} SAEs" in out and "244,140 steps of 2,048" in out and "HuggingFaceFW/fineweb" in out
    assert ("lmsys/lmsys-chat-1m" in out) == ("--mixed_dataset" in args)
    assert f"contexts of {2048 if name.startswith('Qwen') else 1024}" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_every_constant_of_the_reference_is_a_flag_with_its_sentence():
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), "--help"], capture_output=True, text=True, check=True
    )
    flags = (
        "num_tokens eval_num_inputs random_seeds dictionary_widths warmup_steps sparsity_warmup_steps "
        "decay_start_fraction learning_rates wandb_project target_l0s "
    )
    flags += (
        "standard_penalties standard_new_penalties p_anneal_penalties gated_penalties sae_batch_size "
        "llm_batch_size context_length dtype dataset bandwidth "
    )
    flags += (
        "save_dir use_wandb dry_run save_checkpoints layers model_name architectures device hf_repo_id "
        "mixed_dataset buffer_tokens log_steps sparsity_penalty"
    )
    for flag in flags.split():
        assert f"--{flag} " in done.stdout or f"--{flag}," in done.stdout or f"--{flag}\n" in done.stdout, (
            flag
        )
    import ast
    import inspect

    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and str(after.value.value).strip().endswith(".")
            ), field.target.id


def test_numbers_may_have_underscores(tiny_model, text_file, tmp_path, capsys):
    flags = (
        f"train --save_dir {tmp_path}/r --model_name {tiny_model} --dataset {text_file} --layers 1 "
        "--num_tokens 50_000_000 --dictionary_widths 4_096 --dry_run"
    )
    assert main(flags.split()) == 0
    assert "24,414 steps" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--num_tokens 600000",
            "by width (fitted to runs of 0.3M to 1.2M tokens, docs/recipes.md)\n"
            "  gated                    0.0013, 0.00079",
        ),
        ("--num_tokens 50000000", "not measured at this length)\n  gated "),
        (
            "--num_tokens 50000000 --recipe dictionary_learning",
            "(dictionary_learning's)\n  gated                    0.0003",
        ),
        ("--num_tokens 600000 --learning_rates 0.002 0.01", "0.002, 0.01\n"),
    ],
)
def test_a_dry_run_says_the_learning_rates_and_where_they_come_from(
    flags, said, tiny_model, text_file, tmp_path, capsys
):
    base = (
        f"train --save_dir {tmp_path}/r --model_name {tiny_model} --dataset {text_file} --layers 1 "
        "--architectures gated --dictionary_widths 4096 16384 --dry_run"
    )
    assert main([*base.split(), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert said in out[out.index("learning rates ") :]


def test_bf16_on_a_cpu_without_it(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    from monosemy.jobs import plan

    base = (
        f"train --save_dir {tmp_path}/r --model_name {tiny_model} --dataset {text_file} --layers 1 "
        "--device cpu --dry_run"
    ).split()
    monkeypatch.setattr(plan, "cpu_has_bf16", lambda: False)
    for flag in (["--dtype", "bfloat16"], ["--precision", "bf16"]):
        assert main([*base, *flag]) == 2
        assert flag[0][2:] in capsys.readouterr().err
    monkeypatch.setattr(plan, "cpu_has_bf16", lambda: True)
    assert main([*base, "--dtype", "bfloat16"]) == 0


def test_no_command_and_help(capsys):
    assert main([]) == 2 and "train" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "train" in capsys.readouterr().out


# --- monosemy eval: the paths alone say which job it is


@pytest.fixture(scope="module")
def evaluated(tiny_model, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    flags = (
        f"--model_name {tiny_model} --dataset {text_file} --layers 1 --architectures top_k "
        "--dictionary_widths 48 --num_tokens 640 --target_l0s 4"
    )
    flags += (
        " --sae_batch_size 64 --context_length 16 --eval_num_inputs 6 --held_out_fraction 0.1 "
        "--report_latents 5"
    )
    assert main(["train", "--save_dir", str(folder), *flags.split()]) == 0
    return folder


def of_evaluation(folder):
    files = [
        "rows.jsonl",
        "eval_text.npz",
        "report.html",
        "evaluation.json",
        "plots/fvu.png",
        *("eval_results.json", "latents.npz"),
    ]
    places = [folder / "resid_post_layer_1" / "trainer_0" if name in files[-2:] else folder for name in files]
    return {name: (place / name).stat().st_mtime_ns for name, place in zip(files, places, strict=True)}


def row_of(path):
    (line,) = path.read_text().splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    ("flags", "inputs", "spliced"),
    [
        ("", 6, 6),
        ("--llm_batch_size 4", 6, 6),
        ("--device cpu", 6, 6),
        ("--eval_spliced_inputs 2", 6, 2),
        ("--eval_num_inputs 3", 3, 3),
    ],
)
def test_flags_of_speed_and_size_renew_the_run_s_files(evaluated, tmp_path, flags, inputs, spliced):
    before, table = of_evaluation(evaluated), tmp_path / "rows.jsonl"
    assert main(["eval", str(evaluated), "--rows", str(table), *flags.split()]) == 0
    after = of_evaluation(evaluated)
    assert all(after[name] > before[name] for name in before)
    row = row_of(evaluated / "rows.jsonl")
    assert row["n_inputs"] == inputs and row == row_of(table)
    assert (row["spliced_tokens"] < row["tokens"] * 14 / 15) == (spliced < inputs)


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset x.jsonl",
        "--context_length 8",
        "--model_name m",
        "--layer 1",
        "--site mlp_out.1",
        "--format native",
    ],
)
def test_flags_that_ask_another_question_are_refused_for_a_run(evaluated, capsys, flags):
    before = of_evaluation(evaluated)
    assert main(["eval", str(evaluated), *flags.split()]) == 2
    said = capsys.readouterr().err
    assert flags.split()[0].removeprefix("--") in said and f"monosemy eval {evaluated}/*/trainer_*" in said
    assert of_evaluation(evaluated) == before


def test_they_are_taken_where_saes_are_set_beside_each_other(evaluated, text_file, tmp_path):
    before, table = of_evaluation(evaluated), tmp_path / "rows.jsonl"
    (sae,) = evaluated.glob("*/trainer_*")
    assert (
        main(
            [
                "eval",
                str(sae),
                "--context_length",
                "8",
                "--dataset",
                str(text_file),
                "--rows",
                str(table),
                "--llm_batch_size",
                "3",
            ]
        )
        == 0
    )
    assert row_of(table)["context_length"] == 8 and of_evaluation(evaluated) == before


@pytest.mark.parametrize(
    ("flag", "least"), [("eval_num_inputs", 1), ("eval_spliced_inputs", 0), ("llm_batch_size", 1)]
)
def test_sizes_of_an_evaluation_are_checked(evaluated, capsys, flag, least):
    assert main(["eval", str(evaluated), f"--{flag}={least - 1}"]) == 2
    assert f"{flag} is {least - 1}; allowed: {least} or more" in capsys.readouterr().err


def test_a_run_can_be_evaluated_without_splicing(evaluated):
    assert main(["eval", str(evaluated), "--eval_spliced_inputs", "0"]) == 0
    row = row_of(evaluated / "rows.jsonl")
    assert row["loss_recovered_zero"] is None and row["spliced_tokens"] == 0 and row["fvu"] is not None


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["list", "--help"]], ids=" ".join
)
def test_a_pipe_that_nobody_reads_is_left_in_silence(arguments):
    """As `monosemy train --help | head -1` leaves it, whichever of the two is faster."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "monosemy", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", ["eval", "sae"])
def test_an_evaluation_refuses_a_device_without_kernels(evaluated, capsys, command):
    path = evaluated if command == "eval" else next(evaluated.glob("*/trainer_0"))
    assert main(["eval", str(path), "--device", "mps"]) == 2
    assert "device is 'mps'" in capsys.readouterr().err
