"""Whole models: phases, turns, ratios and limits are what they say, whatever the figures."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from bench.peers import PEERS, _gptq_tensors
from tiny_models import IMAGE_TOKENS, save_tiny, tiny_llava
from transformers import DynamicCache, StaticCache

from qvlm_hf.bench.generation import generate
from qvlm_hf.bench.machine import Clock, Limits, measure_limits
from qvlm_hf.bench.memory import decoder_bytes, peak_bytes, stored_bytes
from qvlm_hf.bench.random_models import random_model, random_prompt
from qvlm_hf.bench.turns import Timing, summarize, take_turns
from qvlm_hf.bench.whole_models import Contender, fits_together, measure_models, phase
from qvlm_hf.cli import bench, main
from qvlm_hf.cli.bench_models import _caches, _contenders, _saved
from qvlm_hf.errors import one_line
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.nn.replace import quantized_modules

CPU = torch.device("cpu")
LIMITS = Limits(bandwidth=100.0, operations={"bfloat16": 1000.0})


class Ticks:
    """A clock whose every mark comes one second after the last."""

    def __init__(self):
        self.now = 0

    def mark(self):
        self.now += 1
        return self.now

    def wait(self):
        pass

    def seconds(self, first, last):
        return last - first


def prompt(model, batch, images=1, extra=8):
    tokens = images * IMAGE_TOKENS + extra
    return random_prompt(
        model.config,
        batch,
        prompt_tokens=tokens,
        image_tokens=IMAGE_TOKENS,
        images=images,
        dtype=model.dtype,
        device=CPU,
    )


def contender(name, model, calls=None, **fields):
    def build():
        if calls is not None:
            calls.append(name)
        return model

    defaults = {
        "build": build,
        "inputs": lambda batch: prompt(model, batch),
        "new_cache": lambda batch, length: DynamicCache(),
    }
    return Contender(name=name, **(defaults | fields))


def measure(contenders, batches=(1,), limits=lambda: LIMITS, **options):
    options = {"new_tokens": 2, "rounds": 2, "clock": Ticks()} | options
    return measure_models(contenders, batches, limits, CPU, **options)


# ---- one answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_the_answer_is_that_of_generate(static):
    model = tiny_llava()
    inputs = prompt(model, 2)
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 6) if static else DynamicCache()
    found = generate(model, inputs, 6, cache, Clock(CPU))
    model.generation_config.eos_token_id = None
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(found.tokens, expected[:, length:])
    assert min(found.vision, found.prefill, found.decode) > 0
    text = model.config.text_config
    held = length + (6 if static else 2.5)  # positions, the mean of the first and the last step
    assert found.cache_bytes == 2 * text.num_hidden_layers * 2 * text.hidden_size * held * 4


def test_the_marks_lie_between_the_phases():
    model = tiny_llava()
    found = generate(model, prompt(model, 1), 5, DynamicCache(), Ticks())
    assert (found.vision, found.prefill, found.first_token) == (1, 1, 2)
    assert found.decode == 1 / 4  # one mark behind four steps
    assert not model.get_decoder()._forward_pre_hooks


def test_a_cache_that_is_not_used_is_an_error():
    model = tiny_llava()

    def step(**inputs):
        return model(input_ids=inputs["input_ids"])

    with pytest.raises(ValueError, match="holds 24 positions instead of 25"):
        generate(model, prompt(model, 1), 2, DynamicCache(), Clock(CPU), step=step)


# ---- turns and ratios ----------------------------------------------------------------------------


def test_contenders_take_turns_behind_rounds_that_warm_up():
    order = []

    def run(name, turn):
        order.append((name, turn))
        return f"{name}{turn}"

    assert take_turns(["a", "b"], 2, run, warm_ups=2) == {"a": ["a1", "a2"], "b": ["b1", "b2"]}
    assert order == [(name, turn) for turn in (-1, 0, 1, 2) for name in "ab"]


def test_a_contender_that_fails_is_named_and_left_out():
    order = []

    def run(name, turn):
        order.append(name)
        if name == "b" and turn == 1:
            raise RuntimeError("no\nkernel")
        return turn

    assert take_turns(["a", "b"], 2, run) == {"a": [1, 2], "b": "RuntimeError: no kernel"}
    assert order == ["a", "b", "a", "b", "a"]
    assert len(one_line(ValueError("x" * 1000))) == 160


def test_a_timing_is_a_median_beside_the_baselines():
    found = summarize([4.0, 1.0, 2.0, 3.0, 5.0], [6.0, 6.0, 100.0])
    assert (found.seconds, found.speedup) == (3, 2)
    assert found.spread == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("moved", "computed", "compute", "regime", "share"),
    [
        (80, 100, "bfloat16", "memory", 0.8),
        (80, 900, "bfloat16", "compute", 0.9),
        (30, 400, "bfloat16", "overhead", 0.4),
        (60, 400, "int8", "memory", 0.6),  # a type that PyTorch could not multiply
    ],
)
def test_a_phase_says_what_limits_it(moved, computed, compute, regime, share):
    second = Timing(seconds=1.0, spread=0.0, speedup=1.0)
    found = phase(second, moved, computed, LIMITS, compute)
    assert (found.regime, found.of_limit) == (regime, pytest.approx(share))


# ---- the measurement -----------------------------------------------------------------------------


def test_models_get_rows_ratios_and_errors():
    model, other, built, passes = tiny_llava(), tiny_llava(dtype=torch.bfloat16), [], []

    def broken():
        raise ImportError("needs more")

    contenders = [
        contender("base", model, built),
        contender("half", other, built),
        contender("absent", model, built, missing="not installed"),
        contender("broken", model, build=broken),
    ]
    rows, _ = measure(contenders, [1, 3], new_tokens=3, advance=lambda: passes.append(1))
    names = [one.name for one in contenders]
    assert [(row.way, row.batch) for row in rows] == [(name, b) for b in (1, 3) for name in names]
    assert built == ["base", "half"]
    assert len(passes) == 2 * 2 * 3
    base, half, absent, failed = rows[4:]
    assert (absent.error, failed.error) == ("not installed", "ImportError: needs more")
    assert absent.decode is None
    assert (base.weight_bytes, half.weight_bytes) == (stored_bytes(model), stored_bytes(other))
    assert base.decode.time == Timing(seconds=0.5, spread=0.0, speedup=1.0)
    assert base.tokens_per_second == 3 / 0.5
    assert base.peak_bytes is None or base.peak_bytes > base.weight_bytes
    # 24 prompt tokens and the mean of one and two steps more, of 3 prompts
    cached, read = 2 * 2 * 64 * 4 * 3 * (24 + 26) / 2, decoder_bytes(model)
    assert base.decode.of_limit == pytest.approx((read + cached) / 0.5 / LIMITS.bandwidth)
    assert base.decode.regime == "memory"
    linears = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    computed = sum(2 * linear.weight.numel() for linear in linears) * 24 * 3 / 1000
    assert base.prefill.of_limit == pytest.approx(max(computed, read / 100))


def test_one_after_the_other_where_memory_is_short():
    model, calls = tiny_llava(), []
    pair = (
        contender("base", model, calls, size=100),
        contender("other", model, calls, size=50, building=90),
    )
    assert fits_together(pair, 10**6)
    assert not fits_together(pair, 250)  # both, a reserve, and room to build
    rows, _ = measure(pair, together=False, advance=lambda: calls.append("pass"))
    assert calls == ["base", "pass", "pass", "pass", "other", "pass", "pass", "pass"]
    assert rows[1].decode.time.speedup == 1


def test_without_a_baseline_there_is_nothing_to_compare():
    model = tiny_llava()
    with pytest.raises(ValueError, match="the baseline base failed"):
        measure([contender("base", model, missing="not here"), contender("b", model)])


def test_the_higher_limits_count():
    other = Limits(bandwidth=50.0, operations={"bfloat16": 2000.0})
    seen = iter([LIMITS, other])
    _, limits = measure([contender("base", tiny_llava())], limits=lambda: next(seen))
    assert limits == Limits(bandwidth=100.0, operations={"bfloat16": 2000.0})
    assert next(seen, None) is None


# ---- memory and limits ---------------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors():
    model, tied = tiny_llava(), tiny_llava(tie_word_embeddings=True)
    table, decoder = model.get_input_embeddings().weight, model.get_decoder()
    assert stored_bytes(model) - stored_bytes(tied) == table.nbytes
    tensors = (*decoder.parameters(), *decoder.buffers(), model.lm_head.weight)
    assert decoder_bytes(model) == sum(tensor.nbytes for tensor in tensors) - table.nbytes
    assert decoder_bytes(tied) == decoder_bytes(model)  # the head reads the table


def test_parts_beside_a_weight_count():
    linear = torch.nn.Linear(4, 4, bias=False)
    linear.weight.quant_state = SimpleNamespace(absmax=torch.zeros(10), code=torch.zeros(16))
    assert stored_bytes(linear) == 4 * (16 + 10 + 16)


def test_the_peak_is_what_was_taken_for_a_while():
    size = 2**26
    found = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert found is None or 0.9 * size < found < 2 * size  # the system counts pages in batches


def test_limits_are_measured():
    limits = measure_limits(CPU, size=64)
    assert {"bfloat16", "float32"} <= set(limits.operations)
    assert min(limits.bandwidth, *limits.operations.values()) > 1e6


# ---- random models -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A4", "W3A8", "W4A16"])
def test_random_models_have_the_shapes_of_real_ones_and_finite_answers(scheme):
    model = tiny_llava()
    modules = planned_report(model, QVLMConfig(scheme=scheme, group_size=32).settings()).modules
    made = random_model(model.config, dtype=torch.bfloat16, device=CPU, modules=modules)
    assert {name for name, _ in quantized_modules(made)} == set(modules)
    assert made.dtype == torch.bfloat16
    with torch.no_grad():
        logits = made(**prompt(made, 2)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    for _, module in quantized_modules(made):
        assert module.dequantize().std() == pytest.approx(module.in_features**-0.5, rel=0.1)
        if used := module.in_features * module.scheme.weight_bits % 32:
            assert not (module.weight[:, -1] >> used & (2 ** (32 - used) - 1)).any()


def test_a_random_model_in_full_precision_equals_nothing_but_its_shape():
    model = tiny_llava()
    made = random_model(model.config, dtype=torch.float32, device=CPU)
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (made, model)]
    assert shapes[0] == shapes[1]
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize(("images", "tokens"), [(0, 5), (2, 40), (2, 20)])
def test_prompts_hold_their_pictures(images, tokens):
    config = tiny_llava().config
    options = {"prompt_tokens": tokens, "images": images, "image_tokens": IMAGE_TOKENS}
    options |= {"dtype": torch.bfloat16, "device": CPU}
    if tokens <= images * IMAGE_TOKENS:
        with pytest.raises(ValueError, match="must be more than the 32 that 2 pictures take"):
            random_prompt(config, 3, **options)
        return
    inputs = random_prompt(config, 3, **options)
    assert inputs["input_ids"].shape == (3, tokens)
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 3 * images * IMAGE_TOKENS
    assert ("pixel_values" in inputs) == bool(images)


# ---- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_shrink_all_but_the_head_and_still_answer(peer):
    pytest.importorskip(peer.package)
    parts = ("vision", "text")
    sizes = {f"{part}_hidden_size": 128 for part in parts}
    sizes |= {f"{part}_intermediate_size": 256 for part in parts}
    model, full = (tiny_llava(dtype=torch.bfloat16, **sizes) for _ in range(2))
    peer.quantize(model)
    (base, row), _ = measure([contender("full", full), contender(peer.name, model)], new_tokens=3)
    assert row.error is None
    assert row.weight_bytes < (0.5 + peer.share) * base.weight_bytes
    assert torch.equal(model.lm_head.weight, full.lm_head.weight)


@pytest.mark.parametrize(("v2", "stored_zero"), [(True, 8), (False, 7)])
def test_gptq_tensors_are_the_weight_to_half_a_step(v2, stored_zero):
    linear = torch.nn.Linear(256, 24, dtype=torch.bfloat16)
    tensors = _gptq_tensors(linear, v2=v2)
    shifts = torch.arange(0, 32, 4)
    codes = (tensors["qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)  # [in, out]
    zeros = (tensors["qzeros"][..., None] >> shifts & 15).flatten(1)  # [groups, out]
    assert zeros.shape == tensors["scales"].shape == (2, 24)
    assert (zeros == stored_zero).all()
    scale = tensors["scales"].repeat_interleave(128, 0)
    assert ((codes - 8) * scale - linear.weight.float().T).abs().sub(scale / 2).max() < 1e-6
    assert torch.equal(tensors["bias"], linear.bias)
    assert "bias" not in _gptq_tensors(torch.nn.Linear(256, 24, bias=False), v2=v2)


def test_a_torchao_model_that_stays_as_it_was_is_an_error():
    pytest.importorskip("torchao")
    peer = next(peer for peer in PEERS if "int4" in peer.name)
    with pytest.raises(ValueError, match="quantizes nothing here"):
        peer.quantize(tiny_llava(dtype=torch.bfloat16))


# ---- caches and compiling ------------------------------------------------------------------------


def test_static_caches_are_used_again_and_empty():
    model = tiny_llava()
    new_cache, inputs = _caches(model.config, static=True), prompt(model, 1)
    cache = new_cache(1, 30)
    first = generate(model, inputs, 3, cache, Clock(CPU))
    assert new_cache(1, 30) is cache
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(generate(model, inputs, 3, cache, Clock(CPU)).tokens, first.tokens)
    assert new_cache(2, 30) is not cache
    assert isinstance(_caches(model.config, static=False)(1, 30), DynamicCache)


def test_every_contender_is_compiled_with_its_own_options(monkeypatch):
    taken, model = [], tiny_llava()
    monkeypatch.setattr(torch, "compile", lambda call, options: taken.append(options) or call)
    static, ours = _caches(model.config, static=True), {"emulate_precision_casts": True}
    contenders = [
        contender("base", model, new_cache=static),
        contender("ours", model, new_cache=static, compile_options=ours),
    ]
    rows, _ = measure(contenders, compiled=True)
    assert taken == [{}, ours]
    assert [row.error for row in rows] == [None, None]


def test_only_models_quantized_by_this_package_round_as_eager(saved):
    options = SimpleNamespace(directory=f"{saved}/w4a8", against=f"{saved}/model")
    subject = _saved(options, CPU)
    contenders = list(_contenders(subject, random_prompt, CPU, static=True, peers=PEERS))
    compiled = {one.name: dict(one.compile_options) for one in contenders if one.compile_options}
    assert compiled == {"qvlm_hf W4A8": {"emulate_precision_casts": True}}
    assert len(contenders) >= 2 + len(PEERS)


@pytest.mark.slow
def test_compiled_decoding_answers_the_same():
    model = tiny_llava()
    static, step = _caches(model.config, static=True), torch.compile(model.forward)
    ((row,), _) = measure(
        [contender("base", model, new_cache=static)], [2], new_tokens=4, clock=None, compiled=True
    )
    assert row.decode.time.seconds > 0
    eager, compiled = (
        generate(model, prompt(model, 2), 4, static(2, 40), Clock(CPU), way).tokens
        for way in (model, step)
    )
    assert torch.equal(compiled, eager)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    save_tiny(folder / "model")
    words = f"quantize {folder}/model --method rtn --scheme W4A8 --output {folder}/w4a8"
    assert main(words.split()) == 0
    return folder


def test_the_command_times_a_saved_model(saved, capsys):
    options = f"--against {saved}/model --batch 1 2 --new-tokens 3 --rounds 2"
    assert main(f"bench {saved}/w4a8 {options} --json {saved}/rows.json".split()) == 0
    printed = capsys.readouterr().out
    assert "w4a8 against model; prompt tokens: 48, pictures: 1, new tokens: 3" in printed
    assert "every way in turns" in printed
    result = json.loads((saved / "rows.json").read_text())
    names = ["bfloat16", *([] if result["bfloat16_units"] else ["float32"]), "qvlm_hf W4A8"]
    rows = result["rows"]
    assert [(row["way"], row["batch"]) for row in rows] == [(n, b) for b in (1, 2) for n in names]
    assert all(row["error"] is None and row["decode"]["time"]["seconds"] > 0 for row in rows)
    assert rows[0]["weight_bytes"] > rows[len(names) - 1]["weight_bytes"]
    assert [row["way"] for row in rows if row["kernel"]] == 2 * ["qvlm_hf W4A8"]
    assert result["settings"]["prompt_tokens"] == 48
    assert str(saved) not in json.dumps(result)


def test_peers_that_are_not_installed_say_so(saved, capsys, monkeypatch):
    monkeypatch.setattr("qvlm_hf.cli.bench_models.find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = [f"{saved}/w4a8", "--new-tokens", "2", "--rounds", "2", "--no-peers"]
    assert bench.run(parser.parse_args(words), PEERS) == 0
    printed = capsys.readouterr().out
    assert "against its own weights, dequantized" in printed
    assert printed.count("not installed") == len(PEERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "exactly one of"),
        ("x --kernels", "exactly one of"),
        ("--shape demo-1b --kernels", "exactly one of"),
        ("--kernels --batch 2", "--batch belongs to DIR and --shape"),
        ("x --tokens 3", "--tokens belongs to --kernels"),
        ("x --scheme W4A4", "--scheme belongs to --shape"),
        ("--shape demo-1b --against y", "--against belongs to DIR"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words.split()])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape gpt-5", "is unknown"),
        ("--shape demo-1b --scheme W9A9", "is not W"),
        ("--shape demo-1b --rounds 1", "must be at least 2"),
        ("--shape demo-1b --prompt-tokens 100", "must be more than the 576"),
        ("--shape demo-1b --prompt-tokens 0", "--prompt-tokens 0 must be more than the 576"),
        ("--shape demo-1b --prompt-tokens 0 --images 0", "0 must be more than the 0"),
        (
            "{f}/w4a8 --new-tokens 465",
            "--prompt-tokens 48 and --new-tokens 465 are more than the model's 512 positions: take",
        ),
        ("--shape demo-1b --prompt-tokens 4090", "more than the model's 4096 positions"),
        ("--shape demo-1b --batch 1 2 1", "--batch 1 2 1 names a value twice: name each once."),
        ("--shape demo-1b --scheme W4A8 w4a8", "--scheme W4A8 w4a8 names a value twice"),
        ("{f}/model", "is not quantized"),
        ("{f}", "no config.json"),
        ("{f}/w4a8 --json {f}/nowhere/x.json", "does not exist"),
        (
            "{f}/w4a8 --against {f}/w4a8",
            "error: --against {f}/w4a8: is quantized itself: give the full-precision model.\n",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_is_built(
    saved, words, message, capsys
):
    words, message = (text.replace("{f}", str(saved)) for text in (words, message))
    assert main(["bench", *words.split()]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
