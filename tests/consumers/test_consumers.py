"""What we export, in the hands of the programs it is for, each in its own environment. Run by `make test-consumers`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import make_text
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from LLMPruner.config import EfficiencyConfig, ExportConfig
from LLMPruner.evaluator.engines import EngineConfig, time_engine
from LLMPruner.export.gguf import write_gguf
from LLMPruner.export.writer import write_exports
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from tests.consumers.exports import export, python_of, qwen2, qwen3, reference, smollm2, tiny

HERE = Path(__file__).parent
PROMPT = "The river rises in the mountains"
TEXTS = [
    PROMPT,
    "The capital of France is Paris, and that of Italy is",
    "def mean(values):\n    return sum(values) /",
    "In 1687 Newton published 3 laws of motion; the 2nd says that",
    "  \n\nOnce upon a time there was a small house at the edge of a very large and very dark forest, and in it lived",
    "Δx = 3.5 µm, naïve café, 河流从山里流出",
]
VERSIONS = ["pinned", "transformers-4.57", "transformers-newest"]
pytestmark = pytest.mark.consumers


def run(python: str, script: str | Path, *arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a script in its own process, away from this repository."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home"), **environment}
    settings["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums of floats depend on how they are split
    done = subprocess.run(
        [python, script if script == "-m" else str(HERE / script), *map(str, arguments)],
        cwd=cwd,
        env=settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_without_this_repository(version, export, tmp_path):
    python = sys.executable if version == "pinned" else python_of(version)
    facts = json.loads(run(python, "run_transformers.py", export.folder / "hf", "out.pt", cwd=tmp_path).splitlines()[-1])
    assert facts["class"] == f"Pruned{export.loaded.plan.geometry.table.name}ForCausalLM"
    assert facts["tokens"] == export.loaded.tokenizer(PROMPT).input_ids
    result = torch.load(tmp_path / "out.pt")
    low = load_model(find_model(str(export.folder / "hf"), "--model_path"), dtype="bfloat16", device="cpu").model
    with torch.no_grad():
        logits, low_logits = (m(input_ids=torch.tensor([facts["tokens"]])).logits for m in (export.loaded.model, low))
    _, greedy = reference(export.loaded, facts["tokens"])
    assert result["logits"].equal(logits) and result["bfloat16"].equal(low_logits)
    assert result["generated"][0, len(facts["tokens"]) :].tolist() == greedy
    assert facts["cached equals plain"] and facts["padded equals alone"]
    assert facts["kv heads"] == [groups or 1 for groups in export.loaded.plan.kv_counts]
    assert facts["losses"][1] < facts["losses"][0]
    assert facts["reload error"] == 0
    assert facts["inputs"] == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_padded_export_generates_from_what_its_tokenizer_answers(version, export, tmp_path):
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [-1], "pad_token_id": 0}
found = model.generate(**tokenizer(text, return_tensors="pt"), **settings)
print(found[0].tolist())
"""
    python = sys.executable if version == "pinned" else python_of(version)
    (tmp_path / "padded.py").write_text(code)
    found = json.loads(run(python, tmp_path / "padded.py", export.folder / "padded", PROMPT, cwd=tmp_path).splitlines()[-1])
    ids = export.loaded.tokenizer(PROMPT).input_ids
    assert found == ids + reference(export.loaded, ids, 8)[1]


@pytest.mark.parametrize("form", ["f32", "q8_0"])
def test_llama_cpp(form, export, tmp_path):
    path = export.folder / "model.gguf"
    if not path.exists():
        pytest.skip("a pruned Qwen3 has no place in a GGUF")
    if form == "q8_0":
        path = tmp_path / "q8.gguf"
        write_gguf(path, export.loaded, "q8_0")
    ids = [export.loaded.tokenizer(text).input_ids for text in TEXTS]
    job = {"texts": TEXTS, "ids": ids, "new_tokens": 32}
    if export.loaded.tokenizer.chat_template:
        job["messages"] = [{"role": "user", "content": "Hello"}]
    (tmp_path / "job.json").write_text(json.dumps(job))
    run(python_of("llama-cpp"), "run_llama_cpp.py", path, "job.json", "out", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == ids
    assert found["metadata"]["general.architecture"] == "deci"
    with numpy.load(tmp_path / "out.npz") as file:
        rows = [compared(export.loaded, row, theirs) for row, theirs in zip(ids, file.values(), strict=True)]
    error, largest, divergence = numpy.max(rows, axis=0)
    print(f"{form}: largest logit {largest:.1f}, difference {error:.2e}, KL {divergence:.2e}")
    if form == "f32":
        assert error < 5e-2 and divergence < 1e-5
        assert found["greedy"] == reference(export.loaded, ids[0])[1]
    else:  # the weights' own error: this model, pruned without repair, carries it far on some of the texts, in torch as well
        assert rows[0][0] < 0.2 * rows[0][1]
    if "messages" in job:
        assert found["metadata"]["tokenizer.chat_template"] == export.loaded.tokenizer.chat_template
        assert found["chat"]


def test_the_speed_of_two_files_is_a_table(tiny, tmp_path):
    dense = tmp_path / "dense.gguf"
    dense.write_bytes((tiny.folder / "model.gguf").read_bytes())
    flags = ["--dense", dense, "--pruned", tiny.folder / "model.gguf", "--repeats", "1"]
    script = HERE.parent.parent / "benchmarks" / "served.py"
    output = run(python_of("llama-cpp"), script, *flags, "--prompt_tokens", "16", "--new_tokens", "4", cwd=tmp_path)
    lines = output.splitlines()
    assert lines[:2] == ["||dense|pruned|ratio|", "|---|---|---|---|"]
    rows = [line.strip("|").split("|") for line in lines[2:5]]
    assert [row[0] for row in rows] == ["prefill (tokens/s)", "decode (tokens/s)", "file (MB)"]
    for _, *speeds, ratio in rows:
        slow, fast = (float(speed.replace(",", "")) for speed in speeds)
        assert slow > 0 and float(ratio) == pytest.approx(fast / slow, rel=0.1)
    command = [python_of("llama-cpp"), script, *flags]  # 512 + 64 tokens, where the model has 256 positions
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and "fewer than the 576 tokens asked for" in done.stderr.splitlines()[-1]


@torch.no_grad()
def compared(loaded, ids: list[int], theirs: numpy.ndarray) -> tuple[float, float, float]:
    """Largest difference of a logit, largest logit, and largest KL(ours || theirs) at a token, in nats."""
    ours = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    other = torch.from_numpy(theirs).double()
    p, q = ours.log_softmax(-1), other.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)  # (tokens,)
    return (ours - other).abs().max().item(), ours.abs().max().item(), divergence.max().item()


def test_vllm(export, tmp_path):
    ids = export.loaded.tokenizer(PROMPT).input_ids
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    output = run(python_of("vllm"), "run_vllm.py", export.folder / "hf", "ids.json", cwd=tmp_path, VLLM_CPU_KVCACHE_SPACE="1")
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert json.loads(line.removeprefix("RESULT ")) == reference(export.loaded, ids)[1]


@pytest.mark.parametrize(("engine", "form"), [("llama.cpp", "model.gguf"), ("vllm", "hf")])
def test_an_engine_times_what_is_exported(engine, form, tiny):
    config = EngineConfig(engine, python_of(engine.replace(".", "-")), 1)
    path = tiny.folder / form
    times = time_engine({"one": path, "other": path}, config, EfficiencyConfig(prompt_tokens=16, new_tokens=8, repeats=1))
    assert times.engine == engine and times.version[0].isdigit()
    assert all(speed.prefill > 0 and speed.decode > 0 for speed in times.speeds.values())


def test_lm_eval_agrees_with_our_own_accuracy(smollm2, tmp_path):
    questions = [
        ("The opposite of hot is", ["cold", "blue", "seven"], 0),
        ("Two plus two makes", ["a tree", "four", "the sea"], 1),
        ("The capital of France is", ["Berlin", "Madrid", "Paris"], 2),
        ("Fish live in the", ["water", "chimney", "alphabet"], 0),
        ("At night we see the stars and the", ["carpet", "moon", "sandwich"], 1),
        ("A week has seven", ["days", "wheels", "kings"], 0),
        ("Bees make", ["petrol", "honey", "glass"], 1),
        ("In winter it is", ["square", "purple", "cold"], 2),
    ]
    rows = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in questions]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "little.yaml").write_text(
        f"task: little\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: query\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n"
    )
    arguments = ["-m", "lm_eval", "--model", "hf", "--tasks", "little", "--include_path", str(tmp_path), "--device", "cpu"]
    arguments += ["--model_args", f"pretrained={smollm2.folder / 'hf'},trust_remote_code=True,dtype=float32"]
    arguments += ["--output_path", str(tmp_path / "result"), "--batch_size", "4"]
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([python_of("lm-eval"), *arguments], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "result").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["little"]["acc,none"]
    ours = sum(best_choice(smollm2.loaded, query, choices) == gold for query, choices, gold in questions) / len(questions)
    assert theirs == pytest.approx(ours)
    assert 0 < ours <= 1


def best_choice(loaded, query: str, choices: list[str]) -> int:
    """The choice of the highest likelihood after the query, by our own runner."""
    runner, scores = LayerRunner.of(loaded.model), []
    start = loaded.tokenizer(query).input_ids
    for choice in choices:
        ids = torch.tensor([loaded.tokenizer(f"{query} {choice}").input_ids])
        whole = runner.head.losses(runner.layers(runner.embed(ids)), ids).item()
        prefix = torch.tensor([start])
        scores.append(whole - runner.head.losses(runner.layers(runner.embed(prefix)), prefix).item())
    return min(range(len(choices)), key=scores.__getitem__)


@pytest.mark.parametrize("shots", [0, 2])
def test_our_tasks_give_the_figures_of_lm_eval_on_the_export_to_the_last_digit(tiny, tmp_path, shots):
    """Also the Brier score, which depends on every digit of every likelihood; prompts begin with BOS, as the tokenizer says."""
    adding = copy.deepcopy(tiny.loaded.tokenizer.backend_tokenizer)
    adding.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=adding, bos_token="<s>", eos_token="</s>")
    loaded = LoadedModel(tiny.loaded.model, tokenizer, tiny.loaded.plan, {"parameters": tiny.loaded.plan.total_params})
    write_exports(loaded, ExportConfig(("hf",)), tmp_path, {})
    words = make_text(200, seed=5).split()
    rows = []
    for place in range(0, 600, 10):
        choices = [" ".join(words[place + shift : place + shift + 2]) for shift in (3, 5, 7)]
        rows.append({"query": " ".join(words[place : place + 3]), "choices": choices, "gold": place // 10 % 3})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = "".join(f"    {split}: {tmp_path}/rows.jsonl\n" for split in ("train", "test"))
    (tmp_path / "little.yaml").write_text(
        f"task: little\ndataset_path: json\ndataset_kwargs:\n  data_files:\n{places}output_type: multiple_choice\n"
        "training_split: train\ntest_split: test\ndoc_to_text: query\n"
        "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
        "  - metric: brier_score\n    aggregation: brier_score\n    higher_is_better: false\nmetadata:\n  version: 1.5\n"
    )
    save_model(tmp_path / "model.bin", loaded)
    asked = ["--tasks", tmp_path / "little.yaml", "--num_fewshot", shots, "--limit", 50]
    arguments = ["--model", "hf", *asked, "--device", "cpu", "--batch_size", "8", "--output_path", tmp_path / "theirs"]
    model = f"pretrained={tmp_path / 'hf'},dtype=float32,trust_remote_code=True"
    run(python_of("lm-eval"), "-m", "lm_eval", *arguments, "--model_args", model, cwd=tmp_path)
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())
    flags = [
        *asked,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--no_ppl",
        "--save_results",
        tmp_path / "r.json",
        "--format",
        "csv",
    ]
    models = ["--models", f"bin={tmp_path / 'model.bin'}", f"export={tmp_path / 'hf'}"]
    script = HERE.parent.parent / "evaluate_models.py"
    again = [run(python_of("lm-eval"), script, *models, *flags, *more, cwd=tmp_path) for more in ([], ["--resume"])]
    records = json.loads((tmp_path / "r.json").read_text())["records"]
    assert len(records) == 6 and again[0] == again[1] and again[0].startswith("model,baseline,parameters,little acc_norm")
    for record in records:
        figure = theirs["results"]["little"][f"{record['metric']},none"]
        assert record["value"] == figure > 0
        error = theirs["results"]["little"][f"{record['metric']}_stderr,none"]
        assert record["stderr"] == (error if error != "N/A" else None)
        assert (record["num_fewshot"], record["version"], record["samples"]) == (theirs["n-shot"]["little"], 1.5, 50)
    assert theirs["n-shot"]["little"] == shots
