"""Text out of a model: the cache and the sliding window, what is drawn how often, whole characters, the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

from engine import generate as program
from engine.config import ConfigError, ModelConfig
from engine.model import GPT
from engine.sampling import TextStream, check_sampling, choose, generate, prompt_tokens, sample_text
from engine.tokenizer import END_OF_TEXT, load_encoding
from engine.weights import write_weights
from tests.engine.conftest import save_model

ENCODING = load_encoding()


def model(vocab_size: int = 64, **changes) -> GPT:
    config = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=vocab_size, tie_head=False)
    gpt = GPT(ModelConfig(**config | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():  # LayerNorm stays as it is: noise there drowns the tokens
            if parameter.dim() == 2:
                parameter.normal_(std=0.5, generator=generator)
    return gpt.eval()


def generated(gpt: GPT, prompt: torch.Tensor, n: int, **options) -> torch.Tensor:
    """(B, n) new tokens."""
    return torch.stack(list(generate(gpt, prompt, n, **options)), 1)


def without_cache(gpt: GPT, prompt: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy continuation with a full forward pass a token; a full context goes on with its newest half."""
    context, new = prompt[:, -gpt.config.block_size :], []
    with torch.no_grad():
        for _ in range(n):
            if context.shape[1] > gpt.config.block_size:
                context = context[:, -(gpt.config.block_size // 2) :]
            new.append(gpt(context)[:, -1].argmax(-1))
            context = torch.cat([context, new[-1][:, None]], 1)
    return torch.stack(new, 1)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("prompt_length", [1, 5, 15, 16, 30])
def test_greedy_with_the_cache_equals_argmax_without(positions, prompt_length):
    gpt = model(positions=positions)
    prompt = torch.randint(64, (3, prompt_length), generator=torch.Generator().manual_seed(1))
    expected = without_cache(gpt, prompt, 40)  # past the context of 16 several times
    assert torch.equal(generated(gpt, prompt, 40, temperature=0), expected)
    assert len(expected.unique()) > 10
    assert torch.equal(generated(gpt, prompt[1:2], 40, temperature=0), expected[1:2])


def test_a_forward_pass_sees_only_what_is_new():
    gpt, lengths = model(), []
    hook = gpt.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    generated(gpt, torch.zeros(1, 5, dtype=torch.long), 30)
    hook.remove()
    assert lengths == [5] + [1] * 11 + [8] + [1] * 8 + [8] + [1] * 8


def test_the_same_seed_writes_the_same():
    gpt, prompt = model(), torch.zeros(2, 3, dtype=torch.long)
    once, again, other = (generated(gpt, prompt, 20, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert not torch.equal(once[0], once[1])  # samples of one prompt differ
    state = torch.get_rng_state()
    generated(gpt, prompt, 5)
    assert torch.equal(state, torch.get_rng_state())  # sampling must not move training's random numbers


def drawn(logits: list[float], n: int = 20_000, **options) -> torch.Tensor:
    """How often each token is drawn from these logits."""
    rows = torch.tensor(logits).expand(n, -1)
    tokens = choose(rows, generator=torch.Generator().manual_seed(0), **options)
    return tokens.bincount(minlength=len(logits)) / n


P = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1])
LOGITS = P.log().tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, P),
        ({"temperature": 0.5}, P.square() / P.square().sum()),
        ({"temperature": 2.0}, P.sqrt() / P.sqrt().sum()),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 5}, P),
        ({"top_k": 99}, P),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.69}, [0, 4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [0, 40 / 85, 30 / 85, 15 / 85, 0]),
        ({"top_p": 0.999}, P),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 3 / 7, 0, 0]),  # of the three kept: 0.47, 0.35, 0.18
        ({"top_p": 0.8, "temperature": 0.5}, [0, 0.64, 0.36, 0, 0]),
    ],
)
def test_what_is_drawn_and_how_often(options, expected):
    expected = torch.as_tensor(expected)
    frequencies = drawn(LOGITS, **options)
    assert (frequencies[expected == 0] == 0).all()
    torch.testing.assert_close(frequencies, expected.float(), atol=0.015, rtol=0)


def test_rows_are_drawn_for_themselves():
    logits = torch.full((2, 5), -20.0).scatter(1, torch.tensor([[3], [1]]), 20.0)
    for options in ({}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0}):
        assert choose(logits, **options).tolist() == [3, 1]
    assert choose(logits.bfloat16(), top_k=2).tolist() == [3, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 10}, {"top_p": 0.9, "top_k": 0}])
def test_rows_that_pad_the_embedding_are_never_drawn(options):
    gpt = model(vocab_size=64, head_bias=True)
    with torch.no_grad():
        gpt.lm_head.bias[50:] = 100.0
    prompt = torch.zeros(4, 1, dtype=torch.long)
    assert generated(gpt, prompt, 30, n_tokens=50, **options).max() < 50
    assert generated(gpt, prompt, 30, **options).min() >= 50


def test_it_ends_when_every_sample_has():
    gpt, prompt = model(vocab_size=6), torch.zeros(3, 2, dtype=torch.long)
    options = dict(top_k=0, temperature=4.0, seed=3)
    endless, ended = generated(gpt, prompt, 60, **options), generated(gpt, prompt, 60, **options, stop_token=5)
    stops = [row.tolist().index(5) for row in ended]
    assert len(set(stops)) > 1 and ended.shape[1] == max(stops) + 1 < 60
    assert all((row[stop:] == 5).all() for row, stop in zip(ended, stops))
    assert torch.equal(ended[:, : min(stops) + 1], endless[:, : min(stops) + 1])
    assert (endless[:, max(stops) + 1 :] != 5).any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was(training):
    gpt, prompt = model(positions="rotary").train(training), torch.zeros(1, 2, dtype=torch.long)
    assert not next(generate(gpt, prompt, 5)).requires_grad
    stopped = generate(gpt, prompt, 5)
    next(stopped)
    assert torch.is_grad_enabled()
    stopped.close()
    assert gpt.training == training
    hook = gpt.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(gpt, prompt, 5)
    hook.remove()
    assert gpt.training == training and all(block.training == training for block in gpt.modules())
    gpt(prompt, prompt).backward()  # what sampling left behind, such as rotary tables, can be trained through


def test_a_wrapped_model_is_called_through_its_wrapper():
    class Wrapper(torch.nn.Module):
        config = {"not": "the GPT's"}

        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper(model())
    prompt = torch.zeros(1, 2, dtype=torch.long)
    assert torch.equal(generated(wrapper, prompt, 6), generated(wrapper.module, prompt, 6))
    assert wrapper.calls == 6


# Characters


@pytest.mark.parametrize("text", ["你好，世界", "naïve café", "🙂👩‍👩‍👧‍👦 ok", "𝔘𝔫𝔦 code", "plain"])
def test_no_part_of_a_character_is_ever_shown(text):
    stream, shown = TextStream(ENCODING), ""
    tokens = [ENCODING.encode_single_token(bytes([byte])) for byte in text.encode()]  # every byte a token of its own
    for end, token in enumerate(tokens, start=1):
        shown += stream.feed(token)
        assert shown == text.encode()[:end].decode(errors="ignore")
    assert shown + stream.finish() == text


def test_bytes_that_are_no_character_become_the_replacement_character():
    stream = TextStream(ENCODING)
    byte = lambda b: stream.feed(ENCODING.encode_single_token(bytes([b])))
    assert [byte(0xE4), byte(0xBD), byte(ord("a")), byte(0xFF), byte(0xF0)] == ["", "", "\ufffda", "\ufffd", ""]
    assert stream.finish() == "\ufffd"


def test_an_id_that_the_encoding_leaves_out_is_no_text():
    gap = tiktoken.Encoding("gap", pat_str="a", mergeable_ranks={b"a": 0, b"b": 1}, special_tokens={"<end>": 5})
    stream = TextStream(gap)
    assert [stream.feed(token) for token in (0, 3, 1, 5)] == ["a", "", "b", "<end>"]


def test_an_empty_prompt_begins_a_document():
    assert prompt_tokens(ENCODING, "").tolist() == [[END_OF_TEXT]]
    assert prompt_tokens(ENCODING, "<|endoftext|>", 2).tolist() == [ENCODING.encode_ordinary("<|endoftext|>")] * 2


def test_sample_text_continues_the_prompt():
    gpt = model(vocab_size=50304)
    text = sample_text(gpt, ENCODING, "The 你好", 12, seed=3)
    assert (
        text == sample_text(gpt, ENCODING, "The 你好", 12, seed=3) != sample_text(gpt, ENCODING, "The 你好", 12, seed=4)
    )
    assert text.startswith("The 你好") and len(text) > 20
    ids = generated(gpt, prompt_tokens(ENCODING, "The 你好"), 12, seed=3, n_tokens=ENCODING.n_vocab)
    assert text == "The 你好" + ENCODING.decode(ids[0].tolist())


# The program


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_model(tmp_path / "model.safetensors", model(vocab_size=50304))


def test_the_program_streams_utf8(saved):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    script = Path(__file__).parents[2] / "engine/generate.py"
    flags = [f"--model_path={saved}", "--input_text=你好", "--max_new_tokens=20", "--device=cpu"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, env=environment, cwd=saved.parent)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert text.startswith("你好") and text.endswith("\n") and len(text) > 20
    assert b"device: cpu" in done.stderr and b"20 tokens in" in done.stderr


def test_a_reader_that_has_enough_ends_it_quietly(saved):
    script = Path(__file__).parents[2] / "engine/generate.py"
    flags = [f"--model_path={saved}", "--max_new_tokens=100000", "--device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, script, *flags], **pipes, env=environment)
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and b"Traceback" not in process.stderr.read()


def run(capsys, *flags: str) -> tuple[int, str, str]:
    code = program.main(["--device=cpu", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_several_samples(saved, capsys):
    flags = [f"--model_path={saved}", "--input_text=Hi", "--max_new_tokens=9", "--seed=5"]
    code, out, err = run(capsys, *flags, "--num_samples=3")
    assert code == 0 and "27 tokens in" in err
    texts = out.removesuffix("\n").split("\n---\n")
    assert len(set(texts)) == 3 and all(text.startswith("Hi") for text in texts)
    assert run(capsys, *flags, "--num_samples=3")[1] == out
    greedy = run(capsys, *flags, "--num_samples=2", "--temperature=0")[1].removesuffix("\n").split("\n---\n")
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("content", "prompt"),
    [("你好", "你好"), ("a\n\nb\n", "a\n\nb"), ("a\r\n", "a"), ("\ufeffa\n\n", "a\n"), ("a\r", "a\r"), ("\n", "")],
)
def test_a_prompt_from_a_file_or_standard_input(saved, tmp_path, capsys, monkeypatch, content, prompt):
    flags = [f"--model_path={saved}", "--max_new_tokens=3"]
    expected = run(capsys, *flags, f"--input_text={prompt}")[:2]
    file = tmp_path / "prompt.txt"
    file.write_bytes(content.encode())
    assert run(capsys, *flags, f"--input_file={file}")[:2] == expected
    with open(file) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(capsys, *flags, "--input_text", "-")[:2] == expected


def test_stopping_at_the_end_of_text(tmp_path, capsys):
    gpt = model(vocab_size=50304, head_bias=True)
    with torch.no_grad():
        gpt.lm_head.bias[END_OF_TEXT] = 1e4
    flags = [f"--model_path={save_model(tmp_path / 'm.safetensors', gpt)}", "--input_text=Hi", "--max_new_tokens=4"]
    assert run(capsys, *flags)[1] == "Hi" + "<|endoftext|>" * 4 + "\n"
    code, out, err = run(capsys, *flags, "--stop_at_end_of_text")
    assert code == 0 and out == "Hi\n" and "0 tokens in" in err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model_path=nowhere"], "nowhere is missing"),
        (["--temperature=-1"], "temperature must be 0"),
        (["--top_p=0"], "top_p must be above 0"),
        (["--top_k=-3"], "top_k must be 0"),
        (["--device=tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--seed=99999999999999999999999"], "--seed must be at most 9223372036854775807"),
        ([f"--model_path={__file__}"], "weights can be a run, a checkpoint, a .safetensors"),
        (["--tokenizer_name=r50"], "unknown tokenizer 'r50'"),
        (["--input_file=nowhere"], "error: nowhere: No such file or directory\n"),
        ([f"--input_file={sys.executable}"], "is not UTF-8: byte "),
    ],
)
def test_errors_say_what_is_wrong(saved, capsys, flags, said):
    code, out, err = run(capsys, f"--model_path={saved}", *flags)
    assert code == 2 and out == "" and said in err and "Traceback" not in err


def test_a_tokenizer_that_the_model_does_not_have_is_refused(tmp_path, capsys):
    file = save_model(tmp_path / "m.safetensors", model(vocab_size=300))
    code, _, err = run(capsys, f"--model_path={file}")
    assert code == 2 and "has 300 tokens and r50k_base 50257: give the --tokenizer_name" in err


def test_the_tokenizer_of_the_training_is_taken(tmp_path, capsys):
    ours = model(END_OF_TEXT + 1)
    file = write_weights(tmp_path / "m.safetensors", ours.config, ours.state_dict(), "other")
    code, _, err = run(capsys, f"--model_path={file}")
    assert code == 2 and "unknown tokenizer 'other'" in err
    code, _, err = run(capsys, f"--model_path={file}", "--tokenizer_name=gpt2", "--max_new_tokens=2")
    assert code == 0 and "tokenizer: r50k_base" in err
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = run(capsys, f"--model_path={file}")
    assert code == 2 and err.startswith(f"error: {file}: m.safetensors cannot be read whole")


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(saved, capsys):
    flags = [f"--model_path={saved}", "--max_new_tokens=1"]
    assert "prompt of" not in run(capsys, *flags, "--input_text=" + "a " * 8)[2]
    assert "prompt of 24 tokens: only the last 16 are read\n" in run(capsys, *flags, "--input_text=" + " a" * 24)[2]


def test_which_checkpoint_of_a_run_is_taken_is_said(tmp_path, capsys):
    for step, loss in ((1, 2.0), (2, 3.0)):
        folder = tmp_path / f"run/checkpoints/step_{step:08d}"
        save_model(folder, model(vocab_size=50304))
        state = dict(format=1, step=step, tokens=0, val_loss=loss, counters={}, shards={})
        (folder / "state.json").write_text(json.dumps(state))
    flags = [f"--model_path={tmp_path}/run", "--max_new_tokens=1"]
    assert "step_00000001 (the run's best), " in run(capsys, *flags)[2]
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "state.json").write_text(json.dumps(state | {"val_loss": None}))
    assert "step_00000002 (the run's newest), " in run(capsys, *flags)[2]


@pytest.mark.parametrize("temperature, top_k, top_p", [(float("nan"), 0, 1.0), (float("inf"), 0, 1.0), (1.0, 0, 1.1)])
def test_settings_without_a_distribution_are_refused(temperature, top_k, top_p):
    with pytest.raises(ConfigError):
        check_sampling(temperature, top_k, top_p)
