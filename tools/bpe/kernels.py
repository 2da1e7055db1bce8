"""What Python calls of the compiled code: `encode`, and what makes the table of merges."""

from pathlib import Path

from numba import njit

from engine.tokenizer import END_OF_TEXT
from tools.bpe import merges
from tools.bpe.cache import encode_pretokens
from tools.bpe.digest import digest
from tools.bpe.intrinsics import copy_bytes, pointer
from tools.bpe.memory import CHUNK_BYTES, PADDING_BYTES, MergeScratch, Scratch, Tables
from tools.bpe.merges import merge_windows
from tools.bpe.pretokens import find_starts, long_pretoken_end


@njit
def encode_documents(text, ends, table_arrays, scratch_arrays, merge_arrays, window, out, document, start, at):
    """Write the ids of documents to `out`, END_OF_TEXT after each, from what an earlier call returned or (0, 0, 0).

    text: uint8, the documents end to end; ends: int64 (documents,); out: uint16 (text.size + documents + 7,).
    Returns (document, start, at): the document it stopped in, the byte it stopped at, and the number of ids; all is
    done where `document` is the number of documents. Otherwise the pre-token at `start` wants a larger window.
    """
    t, s, m = table_arrays, scratch_arrays, merge_arrays
    tables = Tables(
        pointer(t.classes),
        pointer(t.byte_ids),
        pointer(t.byte_pairs),
        pointer(t.shifts),
        pointer(t.merges),
        pointer(t.lengths),
        pointer(t.key_shapes),
    )
    scratch = Scratch(
        pointer(s.cache),
        pointer(s.text),
        pointer(s.masks),
        pointer(s.positions),
        pointer(s.keys),
        pointer(s.parts),
    )
    merging = MergeScratch(
        pointer(m.ids),
        pointer(m.ranks),
        pointer(m.before),
        pointer(m.after),
        pointer(m.node_positions),
        pointer(m.node_nexts),
        pointer(m.heads),
        pointer(m.filled),
        pointer(m.filled_words),
        pointer(m.seam),
    )
    ids, whole, chunk, positions = pointer(out), pointer(text), scratch.text, scratch.positions
    while document < ends.size:
        end = ends[document]
        while start < end:
            n = min(CHUNK_BYTES, end - start)
            copy_bytes(chunk, whole, start, n)
            s.text[n : n + PADDING_BYTES] = 0x20
            count = find_starts(chunk, n, tables, scratch)
            if start + n == end:
                positions[count] = n
            else:
                count -= 1
                while count and positions[count] > n - 8:
                    count -= 1
            if count == 0:  # one pre-token fills the chunk
                stop = long_pretoken_end(whole, start, end, tables)
                written = merge_windows(whole, start, stop, window, tables, merging, ids, at)
                if written < 0:
                    return document, start, at
                at += written
                start = stop
                continue
            done = 0
            while True:
                done, at = encode_pretokens(chunk, done, count, tables, scratch, merging, ids, at)
                if done == count:
                    break
                written = merge_windows(chunk, positions[done], positions[done + 1], window, tables, merging, ids, at)
                if written < 0:
                    return document, start + positions[done], at
                at += written
                done += 1
            start += positions[count]
        out[at] = END_OF_TEXT
        at += 1
        document += 1
    return document, start, at


def compiled(sources: str):
    """Return `encode_documents`, `learn_merges` and `place_merges` for Python to call, the GIL released.

    sources: what their machine code is kept for.
    """

    @njit(nogil=True, cache=True)
    def encode(text, ends, tables, scratch, merging, window, out, document, start, at):
        sources
        return encode_documents(text, ends, tables, scratch, merging, window, out, document, start, at)

    @njit(nogil=True, cache=True)
    def learn_merges(tokens, ends, byte_ids):
        sources
        return merges.learn_merges(tokens, ends, byte_ids)

    @njit(nogil=True, cache=True)
    def place_merges(learned):
        sources
        return merges.place_merges(learned)

    return encode, learn_merges, place_merges


encode, learn_merges, place_merges = compiled(digest(Path(__file__).parent.glob("*.py")))
