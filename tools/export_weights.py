"""Writes a model's weights for other programs.

python tools/export_weights.py --model_path runs/13m --format safetensors --out 13m.safetensors
python tools/export_weights.py --model_path runs/gpt2 --format gpt2 --out gpt2/     # for transformers, with tokenizer
python tools/export_weights.py --model_path runs/2b --format gpt-neox --out 2b/     # the same for rotary positions
python tools/export_weights.py --model_path runs/13m --format classic --out 13m.pt     # for train-llm-from-scratch
"""

import argparse
import sys
from pathlib import Path

import tiktoken

from engine.checkpoint import CheckpointError
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import ConfigError, ModelConfig
from engine.device import DTYPES
from engine.formats import FIELDS, R50K_PADDED, R50K_TOKENS, State, WeightsError, require_format, resize_vocab
from engine.tokenizer import DEFAULT_TOKENIZER, canonical, load_encoding
from engine.tokenizer_files import TOKENIZER_FILE, tokenizer_files
from engine.weights import (
    check_target,
    find_weights,
    read_weights,
    recorded_tokenizer,
    write_classic,
    write_hugging_face,
    write_weights,
)


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help="run, checkpoint, .safetensors, Hugging Face folder, .pt")
    add("--out", required=True, metavar="PATH", help="a folder; a .pt for classic; a .safetensors")
    add("--format", required=True, choices=sorted(FIELDS))
    add("--dtype", choices=list(DTYPES), help="of the numbers written; as they are stored without it")
    add(
        "--vocab_size", type=positive, metavar="N",
        help=f"rows of the embedding to keep; without it all, and for gpt2 and gpt-neox {R50K_TOKENS} of {R50K_PADDED}",
    )  # fmt: skip
    add(
        "--tokenizer_name", metavar="NAME",
        help=f"what the model was trained with, where that is not recorded [{DEFAULT_TOKENIZER} where the rows fit it]",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace weights that are there; never those read, nor a run's")
    options = parser.parse_args(arguments)
    try:
        path = find_weights(options.model_path)
        for_transformers = options.format in ("gpt2", "gpt-neox")
        is_folder = for_transformers or options.format == "safetensors" and not options.out.endswith(".safetensors")
        check_target(
            options.out, path, is_folder=is_folder, overwrite=options.overwrite, with_tokenizer=for_transformers
        )
        config, state = read_weights(path)
        tokenizer = _tokenizer(options.tokenizer_name, recorded_tokenizer(path))
        if options.vocab_size:
            _keep_words(options.vocab_size, config.vocab_size, tokenizer or DEFAULT_TOKENIZER)
        if options.dtype:
            state = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in state.items()}
        if for_transformers:
            require_format(config, options.format)
            out = _write_for_transformers(options, config, state, tokenizer)
        else:
            if options.vocab_size:
                config, state = resize_vocab(config, state, options.vocab_size)
            if options.format == "classic":
                out = write_classic(options.out, config, state)
            else:
                out = write_weights(options.out, config, state, tokenizer)
    except (CheckpointError, ConfigError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} -> {out}")
    return 0


def _tokenizer(asked: str | None, recorded: str | None) -> str | None:
    """Return the name of the model's tokenizer; WeightsError where the one asked for is unknown or not the recorded."""
    if not asked:
        return recorded
    asked = canonical(asked)
    if recorded not in (None, asked):
        raise WeightsError(f"--tokenizer_name {asked}: the model was trained with {recorded}")
    try:
        return load_encoding(asked).name
    except ValueError as error:
        raise WeightsError(f"--tokenizer_name: {error}") from None


def _write_for_transformers(
    options: argparse.Namespace, config: ModelConfig, state: State, tokenizer: str | None
) -> Path:
    """Write the folder, and say which tokenizer is in it or why there is none."""
    if not tokenizer and config.vocab_size in (R50K_TOKENS, R50K_PADDED):
        tokenizer = DEFAULT_TOKENIZER
        print(f"tokenizer: {tokenizer}, by the rows of the embedding, as none is recorded; --tokenizer_name: another")
    # Rows beyond r50k's words are padding only where the words are r50k's.
    rows = options.vocab_size or (config.vocab_size if tokenizer not in (None, DEFAULT_TOKENIZER) else None)
    encoding, why_not = _encoding(tokenizer, rows or config.vocab_size)
    files = {}
    if encoding:
        try:
            files = tokenizer_files(encoding, config.block_size)
        except ValueError as error:
            why_not = str(error)
    if why_not:
        there = Path(options.out) / TOKENIZER_FILE
        left = f"the {TOKENIZER_FILE} that is there stays" if there.exists() else f"put its {TOKENIZER_FILE} there"
        print(f"no tokenizer is written: {why_not}; {left}")
    return write_hugging_face(
        options.out, config, state, options.format, vocab_size=rows, encoding=encoding, tokenizer=files
    )


def _encoding(tokenizer: str | None, rows: int) -> tuple[tiktoken.Encoding | None, str]:
    """Return the encoding of a model of `rows` tokens, and where there is none why."""
    if not tokenizer:
        return None, f"none is recorded for this model of {rows} tokens; --tokenizer_name names it"
    try:
        encoding = load_encoding(tokenizer)
    except ValueError as error:
        return None, str(error)
    if encoding.n_vocab > rows:
        return None, f"{tokenizer} has {encoding.n_vocab} tokens and the model {rows}"
    return encoding, ""


def _keep_words(rows: int, there: int, tokenizer: str) -> None:
    """WeightsError where `rows` of the `there` are too few for the tokenizer's words; a model of fewer has its own."""
    if rows < there and rows < (words := load_encoding(tokenizer).n_vocab) <= there:
        raise WeightsError(f"--vocab_size {rows} would cut off words of {tokenizer}, which has {words}: keep those")


if __name__ == "__main__":
    sys.exit(main())
