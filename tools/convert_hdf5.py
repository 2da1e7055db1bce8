"""Turns the classic script's HDF5 files (`tokens`, int32) into token files, and back; every id is compared at the end.

    python tools/convert_hdf5.py data/train/pile_train.h5 data/train/pile_train.bin
    python tools/convert_hdf5.py data/train/pile_train.bin data/train/pile_train.h5

The output appears whole or not at all. A token file without its JSON is taken for uint16 ids of GPT-2.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from engine.command_line import CommandLine, ends_on_ctrl_c
from engine.data import DataError, TokenFile
from engine.tokenizer import DEFAULT_TOKENIZER, load_encoding
from engine.whole_file import whole_file
from tools.disk import write_json
from tools.preparing.token_file import Description, PrepareError, Source, description_path, read_description
from tools.progress import Progress

HDF5_SUFFIXES = (".h5", ".hdf5")
BLOCK_TOKENS = 4 << 20


def convert(source: Path, target: Path, tokenizer_name: str = DEFAULT_TOKENIZER) -> int:
    """Convert between HDF5 and a token file, by their suffixes; return the number of ids.

    tokenizer_name: what made the ids of an HDF5 file, which does not say; those of a token file must be the ones it
    names. PrepareError where a file is not what its name says, an id is none of the tokenizer's, or `target` is there.
    """
    to_hdf5 = target.suffix in HDF5_SUFFIXES
    if to_hdf5 == (source.suffix in HDF5_SUFFIXES):
        raise PrepareError(f"{source}, {target}: one must be HDF5 ({', '.join(HDF5_SUFFIXES)}), the other a token file")
    if target.exists():
        raise PrepareError(f"{target} is there already: move it away, or name another file")
    try:
        with whole_file(target, synced=True) as partial:
            if to_hdf5:
                return _to_hdf5(source, target, partial)
            return _to_token_file(source, target, partial, tokenizer_name)
    except OSError as error:  # h5py's have no file name
        raise PrepareError(f"{source} to {target}: {error}") from error


def _to_token_file(source: Path, target: Path, partial: Path, tokenizer_name: str) -> int:
    try:
        encoding = load_encoding(tokenizer_name)
    except ValueError as error:
        raise PrepareError(str(error)) from None
    lengths = _token_lengths(encoding)
    dtype = np.dtype("<u2" if encoding.n_vocab <= 1 << 16 else "<u4")
    found, last = Source.of(source), encoding.eot_token
    with _hdf5().File(source) as file:
        dataset = _tokens(file, source)
        with open(partial, "wb") as output:
            for start, ids in _blocks(dataset, source.name):
                _check_ids(ids, encoding.n_vocab, start, source, tokenizer_name)
                found.tokens += len(ids)
                found.documents += int(np.count_nonzero(ids == encoding.eot_token))
                found.bytes += int(lengths[ids].sum())
                last = ids[-1]
                ids.astype(dtype).tofile(output)
        found.documents += bool(last != encoding.eot_token)  # the file ends within a document
        if found.tokens == 0:
            raise PrepareError(f"{source} has no ids")
        _compare(dataset, np.memmap(partial, dtype, "r"), source, target)
    description = Description(
        tokenizer=tokenizer_name,
        vocab_size=encoding.n_vocab,
        end_of_text=encoding.eot_token,
        dtype=dtype.name,
        tokens=found.tokens,
        documents=found.documents,
        bytes=found.bytes,
        sources=[found],
    )
    # As in preparing/workspace.py: a token file without its JSON, which gets its name last, would pass for GPT-2's.
    write_json(description_path(target), description)
    return found.tokens


def _to_hdf5(source: Path, target: Path, partial: Path) -> int:
    description = read_description(source)
    if description is None and description_path(source).exists():
        raise PrepareError(f"{source} and {description_path(source).name} do not belong together; prepare it again")
    dtype = np.dtype(description.dtype if description else "uint16").newbyteorder("<")
    size = source.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise PrepareError(f"{source} has {size} bytes, no whole number of {dtype.name} ids; prepare it again")
    try:
        file = TokenFile(source)
        file.check(file.vocab_size)
    except DataError as error:
        raise PrepareError(str(error)) from None
    ids = file.tokens
    with _hdf5().File(partial, "w") as file:
        dataset = file.create_dataset("tokens", ids.shape, np.int32, maxshape=(None,), chunks=(min(len(ids), 1 << 16),))
        for start, block in _blocks(ids, source.name):
            if block.max() > np.iinfo(np.int32).max:
                raise PrepareError(f"{source} has id {block.max()}, more than HDF5's int32 can hold")
            dataset[start : start + len(block)] = block
    with _hdf5().File(partial) as file:
        _compare(ids, file["tokens"], source, target)
    return len(ids)


def _hdf5() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise PrepareError("HDF5 needs h5py: pip install h5py") from None
    return h5py


def _tokens(file, source: Path):
    """Return the dataset `tokens` of an open HDF5 file; PrepareError where it is not a row of integers."""
    if "tokens" not in file:
        raise PrepareError(f"{source} has no dataset `tokens`, only: {', '.join(file) or 'nothing'}")
    dataset = file["tokens"]
    if getattr(dataset, "ndim", None) != 1 or dataset.dtype.kind not in "iu":
        raise PrepareError(f"{source}: `tokens` is not a row of integers but {dataset}")
    return dataset


def _blocks(ids, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place, ids from there on) of a dataset or array, a block at a time."""
    with Progress(name, len(ids), " ids") as bar:
        for start in range(0, len(ids), BLOCK_TOKENS):
            block = np.asarray(ids[start : start + BLOCK_TOKENS])
            yield start, block
            bar.add(len(block))


def _check_ids(ids: np.ndarray, vocab_size: int, start: int, source: Path, tokenizer_name: str) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        at = outside[0]
        raise PrepareError(
            f"{source}: id {ids[at]} at place {start + at} is none of {tokenizer_name}'s, 0 to {vocab_size - 1}: "
            "name the tokenizer that made it with --tokenizer_name"
        )


def _compare(ids, others, source: Path, target: Path) -> None:
    """PrepareError unless both are the same, id for id, as read back from the disk."""
    if len(ids) != len(others):
        raise PrepareError(f"{target} would have {len(others)} ids, {source} has {len(ids)}: look for a failing disk")
    for start, block in _blocks(ids, "comparing"):
        different = np.flatnonzero(block != others[start : start + len(block)])
        if different.size:
            at = start + different[0]
            raise PrepareError(f"{target} would differ from {source} at place {at}: look for a failing disk")


def _token_lengths(encoding) -> np.ndarray:
    """Return the bytes of text of each id, int64 (vocab_size,); 0 for special tokens and ids that are not used."""
    lengths = np.zeros(encoding.n_vocab, np.int64)
    special = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    for token in range(encoding.n_vocab):
        try:
            lengths[token] = 0 if token in special else len(encoding.decode_single_token_bytes(token))
        except KeyError:
            pass
    return lengths


@ends_on_ctrl_c("interrupted; nothing is written")
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("source", type=Path, help="what is converted: .h5, .hdf5, or a token file")
    parser.add_argument("target", type=Path, help="what it becomes: the other of the two")
    about = "what made the ids of HDF5, default %(default)s"
    parser.add_argument("--tokenizer_name", default=DEFAULT_TOKENIZER, metavar="NAME", help=about)
    options = parser.parse_args(arguments)
    try:
        count = convert(options.source, options.target, options.tokenizer_name)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {count} ids, each compared with {options.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
