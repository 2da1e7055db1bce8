"""Write text with a trained model.

    python engine/generate.py --model_path runs/13m --input_text "你好" --max_new_tokens 100
    python engine/generate.py --model_path gpt2/ --input_text "Once upon a time" --temperature 0.7 --top_k 40
    python engine/generate.py --model_path classic.pt --temperature 0          # the likeliest token each time
    python engine/generate.py --model_path runs/13m --input_file prompt.txt    # --input_text -: from standard input

The model is a run, a checkpoint, a .safetensors file, a folder of Hugging Face's GPT-2 or GPT-NeoX, or the classic
script's .pt. The text goes to standard output as it is made, everything else to standard error.
"""

import argparse
import sys
import time
from pathlib import Path

import tiktoken

from engine.checkpoint import CheckpointError, best
from engine.command_line import CommandLine, ends_on_ctrl_c, let_go_of_output, positive
from engine.config import MAX_SEED, ConfigError, require
from engine.device import DTYPES, choose_device, choose_dtype
from engine.formats import WeightsError
from engine.model import GPT
from engine.sampling import TextStream, check_sampling, generate, prompt_tokens
from engine.tokenizer import DEFAULT_TOKENIZER, load_encoding
from engine.weights import ACCEPTED, find_weights, load_model, recorded_tokenizer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help=f"{ACCEPTED}; of a run the best checkpoint is taken")
    prompts = parser.add_mutually_exclusive_group()
    about = "what to continue; empty: the beginning of a document; -: standard input"
    prompts.add_argument("--input_text", default="", metavar="TEXT", help=about)
    about = "the same from a file, in UTF-8; a line feed at its end is left out"
    prompts.add_argument("--input_file", metavar="FILE", help=about)
    add("--max_new_tokens", type=positive, default=100, metavar="N", help="tokens to write [%(default)s]")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token each time [%(default)s]")
    add("--top_k", type=int, default=50, metavar="N", help="draw from the N likeliest; 0: from all [%(default)s]")
    add("--top_p", type=float, default=0.95, metavar="X", help="draw from the likeliest that add up to X [%(default)s]")
    add("--seed", type=int, default=1, metavar="N", help="the same seed writes the same text [%(default)s]")
    add("--num_samples", type=positive, default=1, metavar="N", help="texts to write, side by side [%(default)s]")
    add("--stop_at_end_of_text", action="store_true", help="stop where the model ends the document")
    add(
        "--tokenizer_name",
        metavar="NAME",
        help=f"by default what is recorded of its training, or else {DEFAULT_TOKENIZER}",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights and computation [%(default)s]")
    return parser.parse_args(arguments)


def read_prompt(options: argparse.Namespace) -> str:
    """Return the text to continue; ConfigError where it cannot be read.

    Of a file or standard input a line feed at the end is left out: editors and echo put one there, and after it a model
    begins a new line.
    """
    piped = options.input_file is None and options.input_text == "-"
    if options.input_file is None and not piped:
        return options.input_text
    name = "standard input" if piped else options.input_file
    try:
        content = sys.stdin.buffer.read() if piped else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8: byte {error.start + 1}") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def load(options: argparse.Namespace) -> tuple[GPT, tiktoken.Encoding]:
    """Return the model that `--model_path` leads to and its encoding, and note where they are from."""
    device, device_reason = choose_device(options.device)
    dtype, dtype_reason = choose_dtype(options.dtype, device)
    path = find_weights(options.model_path)
    tokenizer = options.tokenizer_name or recorded_tokenizer(path) or DEFAULT_TOKENIZER
    try:
        encoding = load_encoding(tokenizer)
    except ValueError as error:
        raise ConfigError(f"--tokenizer_name: {error}") from None
    model = load_model(path, device, dtype)
    rows = model.config.vocab_size
    require(
        rows >= encoding.n_vocab,
        f"{path} has {rows} tokens and {encoding.name} {encoding.n_vocab}: give the --tokenizer_name of its training",
    )
    note(model_line(model, path, options.model_path))
    note(f"tokenizer: {encoding.name}")
    note(f"device: {device} ({device_reason}); dtype: {str(dtype).removeprefix('torch.')} ({dtype_reason})")
    return model, encoding


def model_line(model: GPT, path: Path, asked: str) -> str:
    """Return a line on the model at `path`, to which find_weights led from what was asked for."""
    of_run = "" if path == Path(asked) else f" (the run's {'best' if path == best(asked) else 'newest'})"
    return f"model: {path}{of_run}, {model.num_parameters():,} parameters, context {model.config.block_size}"


def write(model: GPT, encoding: tiktoken.Encoding, options: argparse.Namespace) -> None:
    """Write what the model makes of the prompt: the first sample as it is made, the others when they are finished."""
    prompt = prompt_tokens(encoding, options.input_text, options.num_samples)
    if prompt.shape[1] > model.config.block_size:
        note(f"prompt of {prompt.shape[1]} tokens: only the last {model.config.block_size} are read")

    streams = [TextStream(encoding) for _ in range(options.num_samples)]
    later = [""] * options.num_samples
    live = [True] * options.num_samples
    stop = encoding.eot_token if options.stop_at_end_of_text else None
    show(options.input_text)
    began, count = time.perf_counter(), 0
    for chosen in generate(
        model,
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        n_tokens=encoding.n_vocab,
        stop_token=stop,
    ):
        for sample, token in enumerate(chosen.tolist()):
            live[sample] &= token != stop
            if live[sample]:
                count += 1
                text = streams[sample].feed(token)
                later[sample] += text
                if sample == 0:
                    show(text)
    seconds = time.perf_counter() - began
    show(streams[0].finish() + "\n")
    for stream, text in zip(streams[1:], later[1:]):
        show(f"---\n{options.input_text}{text}{stream.finish()}\n")
    note(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s")


def show(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@ends_on_ctrl_c("")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end the program
    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
        require(abs(options.seed) <= MAX_SEED, f"--seed must be at most {MAX_SEED}, got {options.seed}")
        options.input_text = read_prompt(options)
        write(*load(options), options)
    except (CheckpointError, ConfigError, WeightsError) as error:
        note(f"error: {error}")
        return 2
    except BrokenPipeError:
        let_go_of_output()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
