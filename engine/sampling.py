"""Text out of a model: which token comes next, the loop that asks for many, and bytes that become characters.

Shapes: B samples made side by side, T tokens, V vocabulary.
"""

import codecs
from collections.abc import Iterator

import tiktoken
import torch
from torch import Tensor

from engine.config import require
from engine.model import GPT, KVCache
from kernels import softmax


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError for settings that no distribution has."""
    require(0 <= temperature < float("inf"), f"temperature must be 0 (the likeliest) or more, got {temperature:g}")
    require(top_k >= 0, f"top_k must be 0 (every token) or more, got {top_k}")
    require(0 < top_p <= 1, f"top_p must be above 0 and at most 1 (every token), got {top_p:g}")


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for each row of logits (B, V); returns int64 (B,).

    temperature divides the logits, 0 takes the largest. top_k keeps the k likeliest tokens, 0 all. top_p then keeps the
    fewest of the likeliest whose probabilities reach top_p together, at least one (Holtzman et al., nucleus sampling,
    2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    tokens = None
    if top_k or top_p < 1:
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # likeliest first
    # The largest logit becomes 0, so that a temperature near 0 overflows on the unlikely side only.
    probabilities = softmax(logits.float() - logits.amax(-1, keepdim=True).float(), temperature=temperature)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(-1, drawn)).squeeze(-1)


# Not inference_mode: rotary tables first made here would be inference tensors, and training could not save them.
@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int = 0,
    n_tokens: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens that follow `tokens`, int64 (B, T) with T >= 1, one int64 (B,) at a time.

    model: a GPT, or what strategies wrap one in. Tokens are below n_tokens (the encoding's; None: vocab_size), so the
    rows that pad the embedding are never drawn. Once a row has drawn stop_token it goes on with it, and when all rows
    have, the iteration ends. The same seed on the same device gives the same tokens.

    Keys and values are cached. Where the context is full, the newest half of it is encoded again as the beginning of a
    new one: each half-context costs one more forward pass, and a token sees between half and all of block_size.
    """
    gpt = getattr(model, "module", model)
    block_size, weight = gpt.config.block_size, gpt.transformer["wte"].weight
    tokens = tokens.to(weight.device)[:, -block_size:]
    generator = torch.Generator(weight.device).manual_seed(seed)
    size = min(block_size, tokens.shape[1] + max_new_tokens)
    cache = KVCache.empty(gpt.config, tokens.shape[0], size, weight.device, gpt.dtype or weight.dtype)
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=weight.device)
    new = tokens  # what the cache does not hold yet
    was_training = gpt.training
    gpt.eval()
    try:
        for _ in range(max_new_tokens):
            if cache.length + new.shape[1] > block_size:
                new, cache.length = tokens[:, -max(block_size // 2, 1) :], 0
            logits = model(new, cache=cache)[:, -1, :n_tokens]  # (B, V)
            chosen = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop_token is not None:
                chosen = chosen.masked_fill(done, stop_token)
                done |= chosen == stop_token
            yield chosen
            if stop_token is not None and done.all():
                return
            new = chosen[:, None]
            tokens = torch.cat([tokens, new], 1)[:, -block_size:]
    finally:
        gpt.train(was_training)


def prompt_tokens(encoding: tiktoken.Encoding, prompt: str, n_samples: int = 1) -> Tensor:
    """Return the prompt's ids, int64 (n_samples, T); an empty one is <|endoftext|>, after which a document begins."""
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    return torch.tensor([ids]).repeat(n_samples, 1)


class TextStream:
    """Makes text of tokens as they come; a character whose bytes are spread over tokens comes out with its last one."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the characters that are complete with this token; an id that the encoding leaves out has none."""
        try:
            return self._decoder.decode(self._encoding.decode_single_token_bytes(token))
        except KeyError:
            return ""

    def finish(self) -> str:
        """Return U+FFFD where the last character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


def sample_text(model: GPT, encoding: tiktoken.Encoding, prompt: str, max_new_tokens: int, *, seed: int = 0) -> str:
    """Return the prompt and its continuation. With ZeRO stage 3 every process calls it with the same arguments."""
    ids = generate(model, prompt_tokens(encoding, prompt), max_new_tokens, seed=seed, n_tokens=encoding.n_vocab)
    stream = TextStream(encoding)
    return prompt + "".join(stream.feed(int(token)) for token in ids) + stream.finish()
